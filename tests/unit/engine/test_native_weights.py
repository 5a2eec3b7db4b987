"""Base GEMMs in C++: of bfloat16 weights and of 8 bits, the same for a row in any company."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from slipstream.engine.linear import MakeWeight
from slipstream.engine.native.weights import NativeWeight, native_int8, native_weight
from slipstream.engine.packed import PackedWeight
from slipstream.engine.quantized import Int8Weight, in_int8

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
AVX512_BF16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no AVX512-BF16")


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(weight: torch.Tensor, bias: torch.Tensor | None, make: MakeWeight = native_weight) -> NativeWeight:
    made = make("linear", weight, bias)
    assert isinstance(made, NativeWeight)
    return made


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What 8 bits leave of it."""
    whole, step = in_int8(weight)
    return whole.float() * step.float().unsqueeze(1)


@AVX512_BF16
@pytest.mark.parametrize("make", [native_weight, native_int8])
@pytest.mark.parametrize("outputs", [8, 32, 50, 96])
@pytest.mark.parametrize("rows", [1, 3, 12, 13, 100, 200])
def test_base_products(make: MakeWeight, outputs: int, rows: int) -> None:
    weight, bias = normal(outputs, 70, dtype=torch.bfloat16), normal(outputs, dtype=torch.bfloat16, seed=1)
    x = normal(rows, 140, dtype=torch.bfloat16, seed=2)[:, :70]
    made = product(weight, bias, make)
    if make is native_int8:
        weight = rounded(weight)
        torch.testing.assert_close(made.row_norms_sq, weight.square().sum(dim=1))
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(made(x, with_bias=False).double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(made(x).double(), exact + bias.double(), rtol=1e-2, atol=1e-2)


@AVX512_BF16
@pytest.mark.parametrize("make", [native_weight, native_int8])
def test_a_base_products_row_does_not_depend_on_its_company(make: MakeWeight, threads: Callable[[int], None]) -> None:
    weight, x = normal(100, 576, dtype=torch.bfloat16), normal(200, 576, dtype=torch.bfloat16, seed=1)
    made = product(weight, None, make)
    threads(2)
    whole = made(x)
    threads(1)
    for first, last in ((0, 1), (3, 7), (0, 13), (90, 110), (199, 200)):
        assert torch.equal(made(x[first:last]), whole[first:last])


def test_other_weights_are_packed_as_before() -> None:
    for weight in (normal(8, 16, dtype=torch.float32), normal(8, 15, dtype=torch.bfloat16)):
        assert isinstance(native_weight("linear", weight, None), PackedWeight)
        assert isinstance(native_int8("linear", weight, None), Int8Weight)


@AVX512_BF16
def test_8_bits_are_the_same_numbers_as_in_torchs_kernel() -> None:
    weight, x = normal(40, 64, dtype=torch.bfloat16), normal(3, 64, dtype=torch.bfloat16, seed=1)
    mine, torchs = product(weight, None, native_int8), Int8Weight(weight, None)
    torch.testing.assert_close(mine(x), torchs(x), rtol=2e-2, atol=2e-2)
    assert torch.equal(mine.row_norms_sq, torchs.row_norms_sq)
    assert mine.scale is not None
    assert torch.equal(mine.scale[:40], torchs._scale.float())


@AVX512_BF16
def test_outputs_of_zeros_and_large_weights_in_8_bits() -> None:
    weight, x = normal(40, 64, dtype=torch.bfloat16), normal(2, 64, dtype=torch.bfloat16, seed=1)
    weight[3], weight[4, 0] = 0.0, 1e6
    got = product(weight, None, native_int8)(x)
    assert bool(got.isfinite().all())
    assert float(got[:, 3].abs().max()) == 0.0
    torch.testing.assert_close(got.float(), x.float() @ rounded(weight).t(), rtol=1e-2, atol=1e-2)
