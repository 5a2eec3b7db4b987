"""Base weights in bfloat16 laid out for the C++ GEMM, on processors with AVX512-BF16."""

from __future__ import annotations

import torch

from slipstream.engine.linear import as_packed
from slipstream.engine.memory import HugePages
from slipstream.engine.native.build import library
from slipstream.engine.packed import BaseWeight

PANEL = 32  # kPanel
_PAGES = HugePages()


def native_weight(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseWeight:
    """A `MakeWeight`: by the C++ GEMM where there is one for it, else as `as_packed`."""
    found = library()
    if found is None or not found.slipstream_has_product() or weight.dtype != torch.bfloat16 or weight.shape[1] % 2:
        return as_packed(name, weight, bias)
    return NativeWeight(weight, bias)


class NativeWeight:
    """A base weight [out, in] in panels of 32 outputs, [panels, in / 2, 32, 2]; outputs are padded with zeros."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        found = library()
        assert found is not None
        outputs, inputs = weight.shape
        self.bias = bias
        self.row_norms_sq = weight.float().square().sum(dim=1)  # [out], for DoRA
        self.outputs = outputs
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL))
        self.panels = _PAGES.keep(padded.view(-1, PANEL, inputs // 2, 2).transpose(1, 2))
        self._product = found.slipstream_product_bf16

    def __call__(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """x: [n, in] → [n, out]."""
        rows, inputs = x.shape
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty(rows, self.outputs)
        bias = self.bias.data_ptr() if with_bias and self.bias is not None else None
        self._product(y.data_ptr(), x.data_ptr(), x.stride(0), self.panels.data_ptr(), bias, rows, inputs, self.outputs)
        return y
