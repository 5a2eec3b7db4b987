"""Freed memory stays with the process, and weights lie in huge pages."""

from __future__ import annotations

import gc
import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slipstream.engine.memory import ALIGNED, HugePages, keep_freed_memory

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

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


def test_tensors_in_huge_pages_are_copies_that_do_not_overlap() -> None:
    pages = HugePages(chunk_bytes=4 * ALIGNED)
    given = [torch.randn(30, 40), torch.randn(2, 3, dtype=torch.bfloat16).transpose(0, 1), torch.randn(100, 100)]
    kept = [pages.keep(tensor) for tensor in given]  # the last is larger than a chunk
    for tensor, own in zip(given, kept, strict=True):
        assert torch.equal(tensor, own)
        assert own.is_contiguous()
        assert own.data_ptr() % ALIGNED == 0
    kept[0].zero_()
    assert torch.equal(given[1], kept[1])
    empty = pages.keep(torch.empty(0, 3))
    assert empty.shape == (0, 3)


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the system gives nobody huge pages")
def test_large_tensors_do_lie_in_huge_pages_and_give_them_back() -> None:
    before = resident()
    given = mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # what the system gives who asks
    given.madvise(mmap.MADV_HUGEPAGE)
    probe = torch.frombuffer(given, dtype=torch.uint8).fill_(1)
    if not huge_kib_of(probe):
        pytest.skip("the system has no huge page left")
    del probe, given
    kept = [HugePages().keep(torch.ones(48 << 20, dtype=torch.uint8)) for _ in range(3)]
    assert any(map(huge_kib_of, kept))
    del kept
    gc.collect()
    assert resident() < before + (48 << 20)


def huge_kib_of(tensor: torch.Tensor) -> int:
    """Of the mapping that a tensor lies in."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= tensor.data_ptr() < high
        elif inside and line.startswith("AnonHugePages"):
            found = int(line.split()[1])
    return found
