"""Rows that pick among ids of their own, as streams do in a draft vocabulary."""

from __future__ import annotations

import shutil
from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.samplers import IdSampler

from slipstream.engine.native import ops
from slipstream.engine.sampling import Draw, RowRequest
from slipstream.protocol import SamplingParams

WAYS = pytest.mark.parametrize(
    "draw",
    [
        None,
        pytest.param(ops.draw, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")),
    ],
    ids=["torch", "kernel"],
)


def sampler(draw: Draw | None) -> IdSampler:
    return IdSampler(200, frozenset((0,)), torch.device("cpu"), draw=draw)


AMONG = [array("i", ids) for ids in ([5], range(3, 20), range(0, 200, 5), range(40, 60))]


@WAYS
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 4},
        {"temperature": 1.3, "seed": 4, "top_p": 0.8},
        {"temperature": 0.8, "seed": 4, "top_k": 6, "min_p": 0.01},
    ],
    ids=["greedy", "sampled", "top-p", "top-k"],
)
def test_rows_that_pick_among_ids_of_their_own(draw: Draw | None, params: dict[str, Any]) -> None:
    """As from all logits, when those of other ids are -inf; rows of different lengths side by side."""
    logits = 3.0 * torch.randn(24, 200, generator=torch.Generator().manual_seed(9))
    few, only = torch.full((24, 40), -torch.inf), torch.full((24, 200), -torch.inf)
    rows = [RowRequest(SamplingParams(**params), i, among=AMONG[i % len(AMONG)]) for i in range(24)]
    for i, row in enumerate(rows):
        assert row.among is not None
        ids = list(row.among)
        few[i, : len(ids)] = only[i, ids] = logits[i, ids]
    picked = sampler(draw).pick(few, rows, None)
    expected = sampler(draw).pick(only, [replace(row, among=None) for row in rows], None)
    assert [pick.token for pick in picked] == [pick.token for pick in expected]
    assert len({pick.token for pick in picked}) > 8
    margins = [(pick.margin, other.margin) for pick, other in zip(picked, expected, strict=True)]
    for margin, other in margins[1 :: len(AMONG)]:  # of rows with several ids
        assert margin == pytest.approx(other, rel=1e-3, abs=1e-3)


@WAYS
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_that_are_not_numbers_pick_one_of_their_ids_all_the_same(draw: Draw | None, temperature: float) -> None:
    rows = [RowRequest(SamplingParams(temperature=temperature), 0, among=ids) for ids in AMONG[:3]]
    scores = torch.full((3, 40), -torch.inf)
    for row, ids in zip(scores, AMONG, strict=False):
        row[: len(ids)] = torch.nan
    for pick, ids in zip(sampler(draw).pick(scores, rows, None), AMONG, strict=False):
        assert pick.token in ids
