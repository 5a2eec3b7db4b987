"""Whether all of a tensor are numbers, whatever the others are."""

from __future__ import annotations

import pytest
import torch

from slipstream.engine.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 17, 99])
def test_one_that_is_no_number_is_found(dtype: torch.dtype, odd: float, place: int) -> None:
    tensor = torch.randn(10, 10).to(dtype)
    assert is_finite(tensor)
    tensor.view(-1)[place] = odd
    assert not is_finite(tensor)
    assert not is_finite(tensor.t())


def test_extremes_of_the_dtype_are_numbers() -> None:
    assert is_finite(
        torch.tensor([torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min], dtype=torch.bfloat16)
    )


def test_nothing_is_all_numbers() -> None:
    assert is_finite(torch.empty(0, 5))
