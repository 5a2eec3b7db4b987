"""What a frozen trunk said is kept: each row is read once, with its companions, as long as there is room."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slipstream.training.states import StateCache

ROW_BYTES = 3 * 4 * 2  # three positions of four bfloat16 numbers


class Trunk:
    """Reads rows, and remembers which were read together."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def read(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        self.passes.append(list(numbers))
        return [torch.full((3, 4), float(number), dtype=torch.bfloat16) for number in numbers]


def pairs(number: int) -> list[int]:
    return [number - number % 2, number - number % 2 + 1]


def test_each_row_is_read_once_with_its_companions() -> None:
    trunk = Trunk()
    cache = StateCache(trunk.read, pairs, capacity=1 << 20)
    assert [int(t[0, 0]) for t in cache.states([3, 4, 0])] == [3, 4, 0]
    assert trunk.passes == [[2, 3], [4, 5], [0, 1]]
    assert [int(t[0, 0]) for t in cache.states([5, 2, 1, 3])] == [5, 2, 1, 3]
    assert len(trunk.passes) == 3


def test_rows_beyond_the_capacity_are_read_again() -> None:
    trunk = Trunk()
    cache = StateCache(trunk.read, pairs, capacity=2 * ROW_BYTES + 1)
    cache.states([0])
    for _ in range(2):
        assert [int(t[0, 0]) for t in cache.states([7, 1, 4])] == [7, 1, 4]
    # The first time it is not known yet that there is no room; from then on only what is missing is read, in one pass.
    assert trunk.passes == [[0, 1], [6, 7], [4], [7, 4]]


def test_without_companions_only_what_is_missing_is_read() -> None:
    trunk = Trunk()
    cache = StateCache(trunk.read, None, capacity=1 << 20)
    cache.states([3, 4])
    cache.states([4, 5, 0])
    assert trunk.passes == [[3, 4], [5, 0]]
