"""Rows that pick among ids of their own, as streams do in a draft vocabulary."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from slipstream.engine.head import Head
from slipstream.engine.native import ops
from slipstream.engine.picking import Picker
from slipstream.engine.sampling import Columns, Sampler, torch_best

BEST = pytest.mark.parametrize(
    "best",
    [
        torch_best,
        pytest.param(ops.best, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")),
    ],
    ids=["torch", "kernel"],
)
AMONG = [array("i", ids) for ids in ([5], range(3, 20), range(0, 200, 5), range(40, 60))]


class FewScores:
    """A head of which only these scores are asked."""

    def __init__(self, scores: torch.Tensor) -> None:
        self._scores = scores

    def scores_among(self, states: torch.Tensor, among: Sequence[array[int]]) -> torch.Tensor:
        return self._scores


def picker(scores: torch.Tensor, best: Any) -> Picker:
    device = torch.device("cpu")
    sampler = Sampler(200, frozenset(), device, Columns(best))
    return Picker(cast("Head", FewScores(scores)), sampler, rescore=False)


@BEST
def test_rows_that_pick_among_ids_of_their_own(best: Any) -> None:
    """As from all logits, when those of other ids are -inf; rows of different lengths side by side."""
    logits = 3.0 * torch.randn(24, 200, generator=torch.Generator().manual_seed(9))
    few, only = torch.full((24, 40), -torch.inf), torch.full((24, 200), -torch.inf)
    among = [AMONG[i % len(AMONG)] for i in range(24)]
    for i, own in enumerate(among):
        ids = list(own)
        few[i, : len(ids)] = only[i, ids] = logits[i, ids]
    picked = picker(few, best).among(among, torch.empty(24, 0))
    assert [pick.token for pick in picked] == only.argmax(dim=1).tolist()
    assert len({pick.token for pick in picked}) > 8
    ordered = only.sort(descending=True).values
    assert [pick.margin for pick in picked] == pytest.approx((ordered[:, 0] - ordered[:, 1]).tolist(), rel=1e-5)


@BEST
def test_rows_that_are_not_numbers_pick_one_of_their_ids_all_the_same(best: Any) -> None:
    scores = torch.full((3, 40), -torch.inf)
    for row, ids in zip(scores, AMONG, strict=False):
        row[: len(ids)] = torch.nan
    for pick, ids in zip(picker(scores, best).among(AMONG[:3], torch.empty(3, 0)), AMONG, strict=False):
        assert pick.token in ids
