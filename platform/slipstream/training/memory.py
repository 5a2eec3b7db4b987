"""What running out of memory looks like, and what to do about it. Torch-free."""

from __future__ import annotations

OUT_OF_MEMORY = (
    "The training ran out of memory. Give a smaller micro_batch_size or max_length, set gradient_checkpointing, or train "
    "fewer or low-rank streams."
)


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a class for CUDA only; its CPU allocator raises RuntimeError with these words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )
