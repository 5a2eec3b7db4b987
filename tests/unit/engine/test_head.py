"""The LM head's logits of some ids."""

from __future__ import annotations

import shutil
from array import array
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slipstream.engine.head import Candidates, Head, Scores, torch_scores
from slipstream.engine.kernels import native_kernels
from slipstream.engine.lora import AdapterBank
from slipstream.engine.native import ops

HIDDEN, VOCAB, ON_HEAD = 32, 90, 5


class Bank:
    """Stands for the LoRA bank: one slot has an adapter on the head."""

    def targets(self, slot: int, name: str) -> object | None:
        return object() if slot == ON_HEAD else None


def make_head(scores: Scores = torch_scores, bias: bool = False, **config: float) -> Head:
    torch.manual_seed(0)
    member = nn.Linear(HIDDEN, VOCAB, bias=bias)
    bank = cast(AdapterBank, cast(Any, Bank()))
    return Head(member, "lm_head", member.weight.data, SimpleNamespace(**config), bank, scores=scores)


KERNELS = pytest.mark.parametrize(
    "scores", [torch_scores, native_kernels(torch.float32, [(1, 16)], 16).scores], ids=["torch", "native"]
)


@KERNELS
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_logits_of_each_rows_own_ids(scores: Scores, scale: float) -> None:
    head = make_head(scores, logit_scale=scale, final_logit_softcapping=3.0)
    states = torch.randn(6, HIDDEN)
    few, many = array("i", [3, 80, 7]), array("i", range(0, VOCAB, 2))
    among = [few, few, many, few, many, many]
    with torch.inference_mode():
        found = head.scores_among(states, among)
    assert found.shape == (6, len(many))
    for row, ids, state in zip(found, among, states, strict=True):
        logits = torch.tanh(head._weight[list(ids)] @ state * scale / 3.0) * 3.0
        torch.testing.assert_close(row[: len(ids)], logits, rtol=1e-4, atol=1e-5)
        assert bool((row[len(ids) :] == -torch.inf).all())


def test_what_an_adapter_a_bias_or_a_negative_scale_would_change_is_not_served() -> None:
    assert (make_head().is_changed(0), make_head().is_changed(ON_HEAD)) == (False, True)
    assert make_head().scores_some
    assert not make_head(bias=True).scores_some
    assert not make_head(logit_scale=-1.0).scores_some


IDS = st.lists(st.integers(0, 99), min_size=1, max_size=40)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(st.tuples(IDS, st.integers(1, 6)), min_size=1, max_size=4), width=st.sampled_from([16, 80, 20]))
def test_the_kernel_scores_as_torch_does(dtype: torch.dtype, wanted: list[tuple[list[int], int]], width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(100, width, generator=generator).to(dtype)
    ends = list(accumulate(count for _, count in wanted))
    states = torch.randn(ends[-1], width, generator=generator).to(dtype)
    candidates = [
        Candidates(array("i", ids), range(end - count, end)) for (ids, count), end in zip(wanted, ends, strict=True)
    ]
    ours = ops.scores(weight, states, candidates)
    theirs = torch_scores(weight.double(), states.double(), candidates)
    rough = dtype == torch.bfloat16 and width == 20  # torch's, rounded
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if rough else 1e-5, atol=5e-2 if rough else 1e-5)
