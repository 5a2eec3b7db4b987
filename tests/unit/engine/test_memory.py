"""Freed memory stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

from slipstream.engine.memory import keep_freed_memory

PROGRAM = """
import ctypes, resource, torch
from slipstream.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        tensors = [torch.ones(3_000_000) for _ in range(4)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc = ctypes.CDLL(None)
assert libc.mallopt(-3, 1 << 17) and libc.mallopt(-1, 1 << 17)  # glibc's first thresholds, without its adapting them
without = faults()
assert keep_freed_memory()
faults()
print(without, faults())
"""


def test_pages_of_the_next_step_do_not_fault_again() -> None:
    """In a process of its own: the setting is the whole process's."""
    if platform.libc_ver()[0] != "glibc":
        assert not keep_freed_memory()
        return
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    without, kept = map(int, out.split())
    assert kept < 100
    assert without > 10 * kept + 100  # huge pages make even these few
