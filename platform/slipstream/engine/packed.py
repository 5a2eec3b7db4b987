"""Base weights laid out once for the processor's own matrix kernels.

A decode step streams every weight through the cores for a handful of rows, so bytes and layout decide its time. Measured on
two AVX2 cores, all linears of SmolLM2-135M in float32, for 1 / 4 / 32 / 128 rows: plain 36 / 68 / 99 / 222 ms, packed for
oneDNN 26 / 27 / 63 / 195 ms, packed as float16 for FBGEMM 14 / 15 / 54 / 186 ms.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional as F

X86_VECTORS = frozenset({"AVX2", "AVX512"})  # where packing was seen to pay in float32


class BaseWeight(Protocol):
    """A weight [out, in] and its bias, in whatever form."""

    bias: torch.Tensor | None
    row_norms_sq: torch.Tensor  # float32 [out], for DoRA

    def __call__(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """x: [n, in] → [n, out], a tensor of its own that the caller may change."""
        ...


class PackedWeight:
    """A base weight [out, in] and its bias behind one call. `fast` False keeps it as it is: the reference."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, fast: bool = True) -> None:
        self.bias = bias
        self.row_norms_sq = weight.float().square().sum(dim=1)  # [out], for DoRA
        self._half: Any = torch.ops.quantized.linear_prepack_fp16(weight, None) if fast and is_half(weight) else None
        self._weight = weight[:0] if self._half is not None else pack(weight) if fast else weight

    @property
    def unpacked(self) -> torch.Tensor:
        """The weight [out, in] itself, of one that was kept as it is."""
        assert self._half is None
        assert not self._weight.is_mkldnn
        return self._weight

    def __call__(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """x: [n, in] → [n, out]."""
        bias = self.bias if with_bias else None
        if self._half is None:
            return packed_linear(x, self._weight, bias)
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, self._half)
        return y if bias is None else y.add_(bias)


def is_half(weight: torch.Tensor) -> bool:
    """Whether a float32 weight on this CPU can be kept in half the bytes without changing a single number.

    It can when every value is a float16 one, as in checkpoints that were bfloat16 or float16 before: FBGEMM widens the values
    again in registers, and all arithmetic stays float32.
    """
    if (
        weight.dtype != torch.float32
        or not _on_x86(weight)
        or "fbgemm" not in torch.backends.quantized.supported_engines
    ):
        return False
    return torch.equal(weight.half().float(), weight)


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether oneDNN's packed GEMM serves this weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and _on_x86(weight)


def _on_x86(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in X86_VECTORS


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] prepacked where that pays, else as it is. Packed, it is of use to `packed_linear` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight) if can_prepack(weight) else weight


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x: [n, in] → [n, out]; `weight` is what `pack` gave."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)
