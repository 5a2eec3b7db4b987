"""The best token without all logits: always the one that float32 finds."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from slipstream.engine.config import FastPath
from slipstream.engine.kernels import pick_kernels
from slipstream.engine.native.build import library
from slipstream.engine.native.greedy import GreedyHead, greedy_head

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
CPU = torch.device("cpu")
ROWS = 8


def head(weight: torch.Tensor) -> GreedyHead:
    """For a weight that it serves."""
    found = greedy_head(weight)
    if found is None:
        assert not library().slipstream_has_filter()  # type: ignore[union-attr]
        pytest.skip("no AVX512-VNNI on this processor")
    return found


def best(weight: torch.Tensor, hidden: torch.Tensor) -> list[int | None]:
    """Its ids."""
    return [pick.token if pick is not None else None for pick in head(weight)(hidden)]


def expected(weight: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    return (hidden.double() @ weight.double().T).argmax(dim=1).tolist()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("outputs", [1, 31, 32, 100, 4000])
@pytest.mark.parametrize("inputs", [16, 80, 576])
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 25, 65])
def test_it_is_the_best_in_float32(outputs: int, inputs: int, rows: int) -> None:
    """Random weights are the hard case: nothing stands out, so that many ids are scored."""
    weight = normal(outputs, inputs, seed=outputs).bfloat16()
    hidden = normal(rows, inputs, seed=rows).bfloat16()
    assert best(weight, hidden) == expected(weight, hidden)


@pytest.mark.parametrize("seed", range(8))
def test_weights_and_rows_of_all_sizes(seed: int) -> None:
    """Outputs whose weights differ a thousandfold, inputs that dwarf the others, rows that are tiny."""
    weight = (normal(500, 64, seed=seed) * 10 ** normal(500, 1, seed=seed + 1)).bfloat16()
    hidden = normal(ROWS, 64, seed=seed + 2)
    hidden[:, seed] *= 300
    hidden = (hidden * 10 ** (3 * normal(ROWS, 1, seed=seed + 3))).bfloat16()
    assert best(weight, hidden) == expected(weight, hidden)


def test_of_equals_the_first_wins() -> None:
    weight = normal(300, 48).bfloat16()
    weight[[17, 18, 250]] = weight[200].clone() * 3
    weight[200] = weight[17]
    hidden = weight[17:18] * 2
    assert best(weight, hidden) == [17]


def test_near_ties_are_told_apart() -> None:
    """By less than 8 bits can tell, and by what bfloat16 logits would round away."""
    weight = normal(1, 64).repeat(64, 1).bfloat16()
    weight[41, 7] *= 1 + 2**-6
    assert best(weight, weight[:1]) == [41]


def test_a_row_does_not_depend_on_its_company(threads: Callable[[int], None]) -> None:
    weight, hidden = normal(700, 96).bfloat16(), normal(ROWS, 96, seed=1).bfloat16()
    own = head(weight)
    threads(2)
    together = own(hidden)
    threads(1)
    assert own(hidden) == together
    assert [found for row in hidden for found in own(row.unsqueeze(0)) or ()] == together


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_not_all_numbers_takes_all_logits(broken: float) -> None:
    weight, hidden = normal(70, 16).bfloat16(), normal(4, 16, seed=1).bfloat16()
    hidden[2, 3] = broken
    found = best(weight, hidden)
    assert found[2] is None
    assert found[:2] + found[3:] == expected(weight, hidden[[0, 1, 3]])


def test_of_a_row_of_zeros_every_id_is_the_best() -> None:
    assert best(normal(70, 16).bfloat16(), torch.zeros(1, 16).bfloat16()) == [0]


@pytest.mark.parametrize("size", [8.0, 30.0, 1000.0])
def test_a_few_inputs_may_dwarf_the_others(size: float) -> None:
    """In both directions, in one group of four and alone; as final hidden states of large models do."""
    weight, hidden = normal(3000, 256).bfloat16(), normal(9, 256, seed=1)
    hidden[:, [0, 1, 77, 255]] *= torch.tensor([1.0, -1.0, 0.5, -2.0]) * size
    assert best(weight, hidden.bfloat16()) == expected(weight, hidden.bfloat16())


@pytest.mark.parametrize("outputs", [2, 31, 33, 700])
def test_margins_are_about_how_far_the_best_is_ahead(outputs: int) -> None:
    weight, hidden = normal(outputs, 64).bfloat16(), normal(20, 64, seed=1).bfloat16()
    exact = (hidden.double() @ weight.double().T).topk(2).values
    for pick, (first, second) in zip(head(weight)(hidden), exact.tolist(), strict=True):
        assert pick is not None
        assert pick.margin == pytest.approx(first - second, abs=0.3)
        assert pick.margin >= 0.0


def test_other_weights_take_all_logits() -> None:
    weight = normal(64, 16).bfloat16()
    assert greedy_head(weight.float()) is None
    assert greedy_head(normal(64, 24).bfloat16()) is None
    weight[3, 3] = float("inf")
    assert greedy_head(weight) is None


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_rows_near_the_ends_of_the_format(size: float) -> None:
    """Their squares are no numbers a float holds."""
    weight, hidden = normal(200, 64).bfloat16(), (normal(3, 64, seed=1) * size).bfloat16()
    weight[50:60] = 0.0
    assert best(weight, hidden) == expected(weight, hidden)


@pytest.mark.parametrize("size", [1e24, 1e-24])
def test_weights_near_the_ends_of_the_format(size: float) -> None:
    """Neither are theirs."""
    weight, hidden = (normal(4000, 64) * size).bfloat16(), normal(300, 64, seed=1).bfloat16()
    assert best(weight, hidden) == expected(weight, hidden)


def test_weights_that_hardly_fit_beside_others() -> None:
    """Nothing is known of their logits: the bound is no number."""
    weight, hidden = normal(100, 64).bfloat16(), normal(2, 64, seed=1).bfloat16()
    weight[:32] = 1e38
    hidden[0] = 0.0
    hidden[1] = -hidden[1].abs()
    assert best(weight, hidden) == expected(weight, hidden)


def test_rows_are_taken_so_many_at_a_time_that_memory_stays_small() -> None:
    weight, hidden = normal(60_000, 16).bfloat16(), normal(90, 16, seed=1).bfloat16()
    own = head(weight)
    assert own._rows_at_once < 90
    assert best(weight, hidden) == expected(weight, hidden)


def test_where_nothing_can_be_left_out_all_logits_are_needed() -> None:
    weight = normal(1, 16).repeat(5000, 1).bfloat16()
    same, other = weight[:1], -weight[:1]
    assert best(torch.cat([weight, other]), torch.cat([same, other])) == [None, 5000]


def test_it_can_be_turned_off() -> None:
    weight = normal(64, 16).bfloat16()
    head(weight)
    shapes = [(2, 16)]
    assert pick_kernels(CPU, (), torch.bfloat16, shapes, 16).greedy(weight) is not None
    for off in (FastPath.FILTERED_HEAD, FastPath.NATIVE_KERNELS):
        assert pick_kernels(CPU, (off,), torch.bfloat16, shapes, 16).greedy(weight) is None
