"""Weights laid out for the C++ kernels: base weights in bfloat16 or int8 for the GEMM, and adapters' in stacks.

On processors with AVX512-BF16 one instruction takes two inputs, whose weights lie side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from slipstream.engine.linear import as_packed
from slipstream.engine.memory import HugePages
from slipstream.engine.native.build import library
from slipstream.engine.packed import BaseWeight
from slipstream.engine.quantized import in_int8, norms_sq, torch_int8
from slipstream.engine.stacks import ModulePlace

PANEL = 32  # kPanel
_PAGES = HugePages()


def native_weight(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseWeight:
    """A `MakeWeight`: by the C++ GEMM where there is one for it, else as `as_packed`."""
    return NativeWeight(weight, bias) if _served(weight) else as_packed(name, weight, bias)


def native_int8(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseWeight:
    """A `MakeWeight`: in 8 bits by the C++ GEMM where there is one for it, else by torch's kernel."""
    return NativeInt8Weight(weight, bias) if _served(weight) else torch_int8(name, weight, bias)


def _served(weight: torch.Tensor) -> bool:
    found = library()
    if found is None or not found.slipstream_has_product():
        return False
    return weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0


def _panels(weight: torch.Tensor) -> torch.Tensor:
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, 0, 0, -outputs % PANEL))
    return _PAGES.keep(padded.view(-1, PANEL, inputs // 2, 2).transpose(1, 2))


class NativeWeight:
    """A base weight [out, in] in panels of 32 outputs, [panels, in / 2, 32, 2]; outputs are padded with zeros."""

    scale: torch.Tensor | None = None  # of the outputs' steps, float32 [panels * 32], where weights are int8

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, row_norms_sq: torch.Tensor | None = None
    ) -> None:
        self.bias = bias
        self.row_norms_sq = weight.float().square().sum(dim=1) if row_norms_sq is None else row_norms_sq  # for DoRA
        self.outputs = weight.shape[0]
        self.panels = _panels(weight)

    def __call__(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """x: [n, in] → [n, out]."""
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty(x.shape[0], self.outputs)
        self._product(y, x, self.bias.data_ptr() if with_bias and self.bias is not None else None)
        return y

    def _product(self, y: torch.Tensor, x: torch.Tensor, bias: int | None) -> None:
        found = library()
        assert found is not None
        where = y.data_ptr(), x.data_ptr(), x.stride(0), self.panels.data_ptr()
        found.slipstream_product_bf16(*where, bias, *x.shape, self.outputs)


class NativeInt8Weight(NativeWeight):
    """The same in 8 bits, with a step for each output. Products are those of bfloat16 numbers, which whole numbers below 256
    are: activations are not rounded."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        whole, scale = in_int8(weight)
        super().__init__(whole, bias, norms_sq(whole, scale))
        self.scale = F.pad(scale.float(), (0, -self.outputs % PANEL))

    def _product(self, y: torch.Tensor, x: torch.Tensor, bias: int | None) -> None:
        found = library()
        assert found is not None
        assert self.scale is not None
        where = y.data_ptr(), x.data_ptr(), x.stride(0), self.panels.data_ptr()
        found.slipstream_product_bytes(*where, self.scale.data_ptr(), bias, *x.shape, self.outputs)


class _ModulePlace(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "shrink", "expand")),
        *((name, ctypes.c_int64) for name in ("inputs", "columns", "first", "own", "rank", "outputs")),
    )


@dataclass(frozen=True, slots=True)
class Panels:
    """A `StackLayout`. shrink: [in / k, columns, k]; expand: [panels, rank / k, 32, k], outputs padded with zeros.
    k: inputs that an instruction takes, 1 or 2."""

    inputs: int

    @staticmethod
    def of(dtype: torch.dtype, all_even: bool) -> Panels:
        """As this processor has them. `all_even`: whether all linears have an even number of inputs."""
        found = library()
        pairs = dtype == torch.bfloat16 and all_even and found is not None and found.slipstream_has_product()
        return Panels(2 if pairs else 1)

    def shrink_shape(self, inputs: int, columns: int) -> tuple[int, ...]:
        """See `StackLayout`."""
        return inputs // self.inputs, columns, self.inputs

    def expand_shape(self, rank: int, outputs: int) -> tuple[int, ...]:
        """See `StackLayout`."""
        return -(-outputs // PANEL), rank // self.inputs, PANEL, self.inputs

    def put(self, modules: Sequence[ModulePlace]) -> None:
        """See `StackLayout`. All in one call: somebody waits for each of an adapter's hundreds."""
        found = library()
        assert found is not None
        table = (_ModulePlace * len(modules))()
        for entry, (module, shrink, first, expand, shares) in zip(table, modules, strict=True):
            assert shares == 1, "ranks that share adapters have no C++ kernel for them"
            assert module.a.is_contiguous()
            assert module.b.is_contiguous()
            (inputs, own), outputs = module.a.shape, module.b.shape[1]
            entry.a, entry.shrink, entry.b, entry.expand = map(
                torch.Tensor.data_ptr, (module.a, shrink, module.b, expand)
            )
            entry.inputs, entry.columns, entry.first, entry.own = inputs, shrink.shape[1], first, own
            entry.rank, entry.outputs = expand.shape[1] * self.inputs, outputs
        if modules:
            size = modules[0].expand.element_size()
            found.slipstream_put_modules(ctypes.addressof(table), len(modules), self.inputs, size)
