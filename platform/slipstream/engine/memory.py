"""Where an engine's memory lies: what a step has freed stays here, and weights lie in huge pages."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
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
    tens of thousands of small pages, and looking each of them up takes longer than the processor guesses ahead."""

    def __init__(self, chunk_bytes: int = 64 << 20) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk: mmap.mmap | None = None
        self._used = 0  # bytes of it
        self._lock = threading.Lock()  # engines of one process load in threads of their own

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a tensor in this memory."""
        return self.zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in this memory, which is let go of when the last tensor of its chunk is."""
        count = math.prod(shape)
        if not count:
            return torch.zeros(shape, dtype=dtype)
        need = -(-count * dtype.itemsize // ALIGNED) * ALIGNED
        with self._lock:
            if self._chunk is None or self._used + need > len(self._chunk):
                self._chunk = self._new_chunk(max(need, self._chunk_bytes))
                self._used = 0
            chunk, at = self._chunk, self._used
            self._used += need
        return torch.frombuffer(chunk, dtype=dtype, count=count, offset=at).view(shape)

    @staticmethod
    def _new_chunk(size: int) -> mmap.mmap:
        chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                chunk.madvise(mmap.MADV_HUGEPAGE)
        return chunk
