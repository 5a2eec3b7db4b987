"""The engine's settings: read once, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from slipstream.errors import ConfigError

QUANTIZE = (None, "int8", "int4")
DTYPES = ("auto", "bfloat16", "float32", "float16")


class FastPath(StrEnum):
    """What makes the engine fast and can be turned off, to compare or to find a fault. No text depends on any of them."""

    PACKED_WEIGHTS = "packed-weights"  # base weights laid out for the processor; off: as they were loaded
    GROUPED_LORA = "grouped-lora"  # all adapters of a step in one batched GEMM; off: one adapter after the other
    FLAT_DECODER = "flat-decoder"  # Llama-shaped models without calling their modules; off: as transformers wrote them
    WHOLE_DECODER = "whole-decoder"  # all layers of a step in one C++ call; off: a call for each operation
    NATIVE_KERNELS = (
        "native-kernels"  # processors: attention, adapters and what lies between linears in C++; off: torch
    )
    FILTERED_HEAD = (
        "filtered-head"  # processors: the best token from 8 bits and a few exact logits; off: from all logits
    )
    TRITON_KERNELS = "triton-kernels"  # GPUs: attention and adapters by Triton kernels; off: by torch's own operations
    CUDA_GRAPHS = (
        "cuda-graphs"  # GPUs: small steps replayed as graphs, which needs the Triton kernels; off: launched anew
    )
    ADAPTIVE_DRAFTS = "adaptive-drafts"  # as many drafts as pay; off: all that there are
    COPIED_DRAFTS = "copied-drafts"  # drafts from prompt and answer as well; off: by an adapter's streams only
    DRAFT_VOCABULARY = (
        "draft-vocabulary"  # processors: streams pick among tokens that the adapter's requests hold; off: among all
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything one engine is built from. Sizes are in tokens, blocks or bytes as their names say."""

    model_path: str
    model_id: str
    dtype: str = "auto"
    quantize: str | None = None  # "int8" or "int4": base linears by weight-only kernels
    device: str = "auto"  # "auto" = CUDA when there is one
    num_threads: int | None = None  # None = torch's own choice; of each rank
    max_model_len: int | None = None  # None = the model's own context window
    max_batched_tokens: int = 512  # one budget for decodes, drafts and prefill chunks of a step
    max_num_seqs: int = 64  # sequences with KV at a time
    max_waiting: int = 256  # sequences queued before new ones get Overloaded
    max_queue_wait_s: float = 60.0  # sequences that would wait longer get Overloaded, too
    kv_cache_bytes: int = 1 << 30
    block_size: int = 16  # tokens a block
    prefix_caching: bool = True
    adapter_slots: int = 32  # adapters on the device at a time
    host_adapter_bytes: int = 2 << 30  # adapters kept in host memory
    adapter_fetch_timeout_s: float = 60.0
    scratch_dir: str | None = None  # where adapters are fetched to; None = the system's temporary folder
    fully_sharded_loras: bool = False  # over several ranks: each has its share of A and B, at a collective more a group
    max_draft: int = 8  # most drafts of a step, whatever an adapter's number of streams
    long_prompt_stretch: float = 2.5  # a step with rows of a prompt over the budget, in steps of decodes alone
    disable: tuple[FastPath, ...] = ()

    def __post_init__(self) -> None:
        """Raise `ConfigError` naming the field that cannot work."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}.")
        if not 1.0 < self.long_prompt_stretch < float("inf"):
            raise ConfigError(f"long_prompt_stretch is {self.long_prompt_stretch}; it must be over 1 and finite.")
        if self.quantize not in QUANTIZE:
            raise ConfigError(f"quantize is {self.quantize!r}; use int8 or int4, or leave it out.")
        if self.max_queue_wait_s <= 0:
            raise ConfigError(f"max_queue_wait_s is {self.max_queue_wait_s}; it must be over 0.")
        for name in ("max_batched_tokens", "max_num_seqs", "max_waiting", "block_size", "adapter_slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_num_seqs > self.max_batched_tokens:
            raise ConfigError(
                f"max_num_seqs ({self.max_num_seqs}) is over max_batched_tokens ({self.max_batched_tokens}): "
                "every running sequence needs one token of the step's budget."
            )
