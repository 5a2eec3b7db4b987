"""Whether all of a tensor are numbers, whatever the others are."""

from __future__ import annotations

import pytest
import torch

from slipstream.engine.finite import are_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 17, 99])
def test_one_that_is_no_number_is_found(dtype: torch.dtype, odd: float, place: int) -> None:
    tensor = torch.randn(10, 10).to(dtype)
    assert are_finite([tensor, torch.ones(3)])
    tensor.view(-1)[place] = odd
    assert not are_finite([torch.ones(3), tensor])
    assert not are_finite([tensor.t()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extremes_of_the_dtype_are_numbers(dtype: torch.dtype) -> None:
    assert are_finite([torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)])


def test_nothing_is_all_numbers() -> None:
    assert are_finite([torch.empty(0, 5)])
    assert are_finite([])
