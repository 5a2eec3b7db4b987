"""Base weights in int8 or int4, by torch's own weight-only kernels: fewer bytes a step, and a little of the model's accuracy.
(On processors with AVX512-BF16 int8 has a kernel of ours: `native/weights.py`.)

Activations are rounded to bfloat16 for the kernels, each by itself, so that a row does not depend on its company. Adapters,
streams, embeddings and the LM head stay as they are: adapters are added to the quantised base's output, as in QLoRA
(arXiv 2305.14314).
"""

from __future__ import annotations

from enum import StrEnum

import torch

from slipstream.engine.linear import MakeWeight
from slipstream.engine.packed import BaseWeight
from slipstream.errors import ModelUnsupported

INT4_GROUP = 32  # inputs that share a scale and a zero point
INT4_OUTPUTS = 16  # outputs that the kernel takes at a time


class Quantization(StrEnum):
    """How base linears are kept."""

    INT8 = "int8"  # symmetric, a scale for each output
    INT4 = "int4"  # asymmetric, a scale and a zero point for each 32 inputs of an output; CPU


def in_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] as int8 and a bfloat16 scale for each output, whoever multiplies by them."""
    scale = weight.float().abs().amax(dim=1).div(127).clamp_min(1e-12).bfloat16()
    return (weight.float() / scale.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def norms_sq(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Squared lengths of the rows of what `in_int8` left, float32 [out]."""
    return weight.float().square().sum(dim=1) * scale.float().square()


class Int8Weight:
    """A base weight [out, in] as int8 with a bfloat16 scale for each output."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = bias
        self._weight, self._scale = in_int8(weight)
        self.row_norms_sq = norms_sq(self._weight, self._scale)  # [out], for DoRA

    def __call__(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """x: [n, in] → [n, out]."""
        y = torch._weight_int8pack_mm(x.bfloat16(), self._weight, self._scale).to(x.dtype)
        return y if self.bias is None or not with_bias else y.add_(self.bias)


class Int4Weight:
    """A base weight [out, in] as int4 in groups of 32 inputs, for torch's CPU kernel."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = bias
        grouped = weight.float().view(weight.shape[0], -1, INT4_GROUP)
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)
        scale = ((high - low) / 15).clamp_min(1e-12).bfloat16().float()
        zero = (low + 8 * scale).bfloat16().float()  # the kernel computes (q - 8) * scale + zero
        q = ((grouped - zero.unsqueeze(2)) / scale.unsqueeze(2) + 8).round().clamp(0, 15)
        restored = (q - 8) * scale.unsqueeze(2) + zero.unsqueeze(2)
        self.row_norms_sq = restored.square().sum(dim=(1, 2))  # [out], for DoRA
        self._weight = torch._convert_weight_to_int4pack_for_cpu(q.to(torch.int32).flatten(1), 1)
        self._scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous().bfloat16()

    def __call__(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """x: [n, in] → [n, out]."""
        y = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), self._weight, INT4_GROUP, self._scales).to(x.dtype)
        return y if self.bias is None or not with_bias else y.add_(self.bias)


def torch_int8(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseWeight:
    """A `MakeWeight`: in int8, by torch's kernel."""
    return Int8Weight(weight, bias)


def weight_maker(
    full: MakeWeight, quantize: Quantization | None, keep: str, int8: MakeWeight = torch_int8
) -> MakeWeight:
    """How base weights are kept: by `full` at full precision, as is the one group that is never quantised, `keep` (the LM
    head); `int8` is how in 8 bits."""

    def make(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseWeight:
        if quantize is None or name == keep:
            return full(name, weight, bias)
        if quantize is Quantization.INT8:
            return int8(name, weight, bias)
        if weight.device.type != "cpu" or weight.shape[1] % INT4_GROUP or weight.shape[0] % INT4_OUTPUTS:
            raise ModelUnsupported(
                f"{name} cannot be int4: the kernel runs on CPUs and wants inputs in multiples of {INT4_GROUP} and outputs "
                f"in multiples of {INT4_OUTPUTS}. Use int8."
            )
        return Int4Weight(weight, bias)

    return make
