"""Adapters cut along their rank: what all ranks hold together is the adapter, and rows meet to what one rank gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.parallel.group import Traffic
from slipstream.engine.parallel.lora import NOT_SPLIT, LoraSplit


@dataclass
class Told:
    """A group whose other ranks have already said what they say."""

    rank: int
    size: int
    said: list[torch.Tensor] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)

    def all_reduce_(self, x: torch.Tensor) -> None:
        x.copy_(torch.stack(self.said).sum(0))

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.said


def numbers(*shape: int) -> torch.Tensor:
    """Small whole numbers: sums are exact in any order."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).float()


@given(size=st.integers(1, 9), rank=st.integers(1, 40), siblings=st.integers(1, 3))
def test_column_wise_siblings_get_all_columns_from_all_ranks(size: int, rank: int, siblings: int) -> None:
    x, adapters = numbers(4, 24), [(numbers(24, rank) + i, numbers(rank, 10) - i) for i in range(siblings)]
    groups = [Told(i, size) for i in range(size)]
    cuts = [[LoraSplit(group).cut(a, b) for a, b in adapters] for group in groups]
    shrunk = [torch.cat([x @ a for a, _ in cut], dim=1) for cut in cuts]
    for group, cut, mine in zip(groups, cuts, shrunk, strict=True):
        split = LoraSplit(group)
        group.said = shrunk
        assert {a.shape[1] for a, _ in cut} == {split.width(rank)}
        met = split.meet(mine, siblings).chunk(siblings, dim=1)
        for got, (_, own_b), (a, b) in zip(met, cut, adapters, strict=True):
            assert torch.equal(got @ own_b, x @ a @ b)


@given(size=st.integers(1, 9), rank=st.integers(1, 40))
def test_row_wise_linears_are_expanded_in_parts_that_make_the_whole(size: int, rank: int) -> None:
    x, a, b = numbers(4, 9 * 16), numbers(9 * 16, rank), numbers(rank, 160)
    parts = torch.arange(9 * 16).tensor_split(size)
    groups = [Told(i, size) for i in range(size)]
    shrunk = [x[:, part] @ a[part] for part in parts]
    out = torch.zeros(4, 160)
    for group in groups:
        split = LoraSplit(group, by_inputs=True)
        group.said = shrunk
        own_a, own_b = split.cut(a[parts[group.rank]], b)
        assert own_a.shape[1] == rank
        out[:, split.outputs(160)] += split.meet(x[:, parts[group.rank]] @ own_a) @ own_b
    assert torch.equal(out, x @ a @ b)


@pytest.mark.parametrize("by_inputs", [False, True])
def test_alone_nothing_is_copied(by_inputs: bool) -> None:
    split: Any = LoraSplit(NOT_SPLIT.group, by_inputs)
    a, b = numbers(5, 3), numbers(3, 7)
    assert split.cut(a, b) == (a, b)
    assert split.meet(a) is a
    assert split.outputs(7) == slice(0, 7)
