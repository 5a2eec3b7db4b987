"""Where an engine's memory lies: what a step has freed stays here, and weights lie in huge pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 32 << 20  # bytes; glibc takes no more
ALIGNED = 4096  # bytes, of each tensor
KEPT = 1 << 30  # bytes free before any goes back to the system


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next step, for the whole process; whether it does (elsewhere nothing happens).

    By default tensors of a few megabytes are mapped anew at every allocation, and every page of them faults. Measured on two
    cores: attention of 16 rows over 4,000 tokens takes 88 ms a step with it, 75 to 150 without.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))


class HugePages:
    """Memory for what stays and is read all the time, in pages of 2 MB where the system gives them to who asks (Linux's
    transparent huge pages in their default mode; elsewhere it is ordinary memory). A step reads every weight once, which are
    some hundred thousand small pages, and looking each of them up takes longer than the processor guesses ahead."""

    def __init__(self, chunk_bytes: int = 64 << 20) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = mmap.mmap(-1, mmap.PAGESIZE)
        self._used = len(self._chunk)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a tensor in this memory, which is let go of when the last tensor of its chunk is."""
        if not tensor.numel():
            return tensor.contiguous()
        need = -(-tensor.nbytes // ALIGNED) * ALIGNED
        if self._used + need > len(self._chunk):
            self._chunk = mmap.mmap(-1, max(need, self._chunk_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._used = 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    self._chunk.madvise(mmap.MADV_HUGEPAGE)
        kept = torch.frombuffer(self._chunk, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += need
        return kept.view(tensor.shape).copy_(tensor)
