"""Which code computes attention and adapters on a device, and whether small steps are recorded as graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from slipstream.engine.attention import KVCache
from slipstream.engine.batch import LayOut, segments
from slipstream.engine.config import FastPath
from slipstream.engine.flat import TorchOps
from slipstream.engine.head import Greedy, Scores, all_logits, torch_scores
from slipstream.engine.linear import MakeWeight, RowContext, as_packed
from slipstream.engine.lora import LoraKernels
from slipstream.engine.quantized import torch_int8
from slipstream.engine.sampling import Best, Draw, torch_best
from slipstream.engine.streams import StreamStates, torch_stream_states

if TYPE_CHECKING:  # Triton is only where there is a GPU: these are imported once chosen
    from slipstream.engine.graphs import Capture, Decode, GraphedDecoder


@dataclass(frozen=True, slots=True)
class Kernels:
    """One choice for a whole engine."""

    lora: LoraKernels
    attention: LayOut
    ops: TorchOps = field(default_factory=TorchOps)  # what lies between the linears of decoders that are walked
    weights: MakeWeight = as_packed  # how base weights at full precision are kept
    int8: MakeWeight = torch_int8  # and how in 8 bits
    best: Callable[[torch.Tensor], Best] = torch_best  # of each row of logits
    streams: StreamStates = torch_stream_states
    greedy: Callable[[torch.Tensor], Greedy | None] = all_logits  # of an LM head's weight [V, H]; None = there is none
    draw: Draw | None = None  # the same of rows that are sampled; None = torch's operations
    scores: Scores = torch_scores  # an LM head's, of a few ids
    capture: Capture | None = None  # how small steps are recorded; None = they are not

    def graphs(self, decode: Decode, rows: RowContext, cache: KVCache, max_blocks: int) -> GraphedDecoder | None:
        """The decoder behind graphs, where steps are recorded. `max_blocks`: most blocks of a sequence."""
        if self.capture is None:
            return None
        from slipstream.engine.graphs import GraphedDecoder  # noqa: PLC0415

        return GraphedDecoder(decode, rows, cache, max_blocks, self.capture)


def pick_kernels(
    device: torch.device,
    disable: Collection[FastPath],
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    block_size: int,
) -> Kernels:
    """The fastest that the device has and nobody turned off. shapes: (kv_heads, head_dim) of each layer's cache."""
    lora = LoraKernels.PLAIN if FastPath.GROUPED_LORA in disable else LoraKernels.BATCHED
    if device.type == "cpu" and FastPath.NATIVE_KERNELS not in disable:
        found = native_kernels(dtype, shapes, block_size, lora)
        return replace(found, greedy=all_logits) if FastPath.FILTERED_HEAD in disable else found
    if device.type != "cuda" or FastPath.TRITON_KERNELS in disable or find_spec("triton") is None:
        return Kernels(lora, segments)
    if lora is LoraKernels.PLAIN or FastPath.CUDA_GRAPHS in disable:
        return triton_kernels(lora=lora)
    from slipstream.engine.graphs import CudaCapture  # noqa: PLC0415

    return triton_kernels(CudaCapture())


def native_kernels(
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    block_size: int,
    lora: LoraKernels = LoraKernels.BATCHED,
) -> Kernels:
    """C++ kernels for processors where they can be built, for as much of the model as they serve."""
    from slipstream.engine.native import ops  # noqa: PLC0415
    from slipstream.engine.native.greedy import greedy_head  # noqa: PLC0415
    from slipstream.engine.native.weights import native_int8, native_weight  # noqa: PLC0415

    if not ops.is_available(dtype, torch.device("cpu")):
        return Kernels(lora, segments)
    return Kernels(
        lora=LoraKernels.NATIVE if lora is LoraKernels.BATCHED else lora,
        attention=ops.paged if ops.attends(shapes, block_size) else segments,
        ops=ops.NativeOps(),
        weights=native_weight,
        int8=native_int8,
        best=ops.best,
        streams=ops.stream_states,
        greedy=greedy_head,
        draw=ops.draw,
        scores=ops.scores,
    )


def triton_kernels(capture: Capture | None = None, lora: LoraKernels = LoraKernels.TRITON) -> Kernels:
    """Triton for attention and adapters; on a processor only under Triton's interpreter."""
    from slipstream.engine.triton_attention import paged_tables  # noqa: PLC0415

    return Kernels(LoraKernels.TRITON if lora is LoraKernels.BATCHED else lora, paged_tables, capture=capture)
