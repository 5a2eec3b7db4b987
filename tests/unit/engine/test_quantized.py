"""int8 and int4 base weights: close to the weight they stand for, row by row the same in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from slipstream.engine.linear import as_packed
from slipstream.engine.packed import BaseWeight, PackedWeight, is_half
from slipstream.engine.quantized import Int4Weight, Int8Weight, Quantization, weight_maker
from slipstream.errors import ModelUnsupported

OUT, IN = 48, 96
KINDS: list[tuple[Callable[[torch.Tensor, torch.Tensor | None], BaseWeight], float]] = [
    (Int8Weight, 0.02),
    (Int4Weight, 0.12),
    (PackedWeight, 1e-5),
]


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_kept_weight_stands_for_its_own(
    kind: Callable[[torch.Tensor, torch.Tensor | None], BaseWeight], tolerance: float, bias: bool
) -> None:
    weight, x = matrix(OUT, IN) * matrix(OUT, 1, seed=1).exp(), matrix(5, IN, seed=2)
    shift = matrix(OUT, seed=3) if bias else None
    kept = kind(weight, shift)
    exact = x @ weight.t()
    for with_bias in (True, False):
        expected = exact + shift if shift is not None and with_bias else exact
        got = kept(x, with_bias)
        assert got.dtype == x.dtype
        assert float((got - expected).norm() / exact.norm()) < tolerance
    norms = weight.square().sum(dim=1)
    assert float((kept.row_norms_sq - norms).abs().max() / norms.max()) < 3 * tolerance


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
def test_zeros_and_outliers_do_no_harm(kind: Callable[[torch.Tensor, torch.Tensor | None], BaseWeight]) -> None:
    weight = matrix(OUT, IN)
    weight[0] = 0.0
    weight[1, 0] = 1e4
    got = kind(weight, None)(matrix(2, IN, seed=4))
    assert bool(got.isfinite().all())
    assert float(got[:, 0].abs().max()) == 0.0


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
def test_other_rows_do_not_change_a_row_beyond_rounding(
    kind: Callable[[torch.Tensor, torch.Tensor | None], BaseWeight],
) -> None:
    """An outlier in one row must not change the scale of another's: activations are not scaled by the batch."""
    kept, x = kind(matrix(OUT, IN), None), matrix(6, IN, seed=5)
    alone = torch.cat([kept(row.unsqueeze(0)) for row in x])
    x[0] *= 1e4
    together = kept(x)
    torch.testing.assert_close(together[1:], alone[1:], rtol=2**-7, atol=2**-7)


def test_only_weights_that_float16_holds_are_kept_so() -> None:
    weight = matrix(OUT, IN)
    assert not is_half(weight)
    assert not is_half(weight.bfloat16())
    assert not is_half(weight.half().float() * 1e6)
    fits = torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
    assert is_half(weight.half().float()) == is_half(weight.bfloat16().float()) == fits
    tiny = weight.bfloat16().float()
    tiny[0, 0] = 2.0**-30  # a bfloat16 value that float16 has not
    assert not is_half(tiny)


@pytest.mark.parametrize("shape", [(48, 80), (40, 96)])
def test_int4_refuses_by_name_what_its_kernel_cannot_take(shape: tuple[int, int]) -> None:
    make = weight_maker(as_packed, Quantization.INT4, keep="lm_head")
    with pytest.raises(ModelUnsupported, match=r"layers\.3\.q_proj cannot be int4.*Use int8"):
        make("layers.3.q_proj", matrix(*shape), None)
    assert isinstance(make("lm_head", matrix(*shape), None), PackedWeight)
