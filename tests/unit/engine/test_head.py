"""The LM head's best of some ids."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from slipstream.engine.head import Head, Scores, torch_scores
from slipstream.engine.kernels import native_kernels
from slipstream.engine.lora import AdapterBank

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
def test_the_best_of_each_rows_own_ids(scores: Scores, scale: float) -> None:
    head = make_head(scores, logit_scale=scale)
    states = torch.randn(6, HIDDEN)
    few, many = array("i", [3, 80, 7]), array("i", range(0, VOCAB, 2))
    among = [few, few, many, few, many, many]
    with torch.inference_mode():
        found = head.best_among(states, [0, 0, 1, 0, 1, 1], among)
    assert found is not None
    for pick, ids, state in zip(found, among, states, strict=True):
        logits = head._weight[list(ids)] @ state * scale
        first, second = logits.topk(2).values
        assert pick.token == ids[int(logits.argmax())]
        assert pick.margin == pytest.approx(float(first - second), rel=1e-3)


@KERNELS
def test_rows_that_are_not_numbers_pick_one_of_their_ids_all_the_same(scores: Scores) -> None:
    states = torch.full((2, HIDDEN), float("nan"))
    few, many = array("i", [3, 80]), array("i", range(40))
    with torch.inference_mode():
        found = make_head(scores).best_among(states, [0, 0], [few, many])
    assert found is not None
    assert found[0].token in few
    assert found[1].token in many


def test_an_adapter_on_the_head_takes_all_logits() -> None:
    ids = array("i", [1, 2])
    assert make_head().best_among(torch.zeros(2, HIDDEN), [0, ON_HEAD], [ids, ids]) is None


def test_what_a_bias_or_a_negative_scale_would_change_is_not_served() -> None:
    assert make_head().picks_among
    assert not make_head(bias=True).picks_among
    assert not make_head(logit_scale=-1.0).picks_among
