"""The bank's own LM heads row by row, and the head that mixes them with the base's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.adapters import random_streams
from torch import nn

from slipstream.engine.head import Head
from slipstream.engine.lora import AdapterBank
from slipstream.engine.streams import OwnHead, StreamBank, prepare_streams

HIDDEN, VOCAB = 16, 40
LIKE = torch.empty(0)


@pytest.fixture
def bank() -> StreamBank:
    """Own heads in slots 3 (two) and 5 (three), shared ones in slot 4."""
    bank = StreamBank()
    bank.load(3, prepare_streams(random_streams(HIDDEN, 2, vocab=VOCAB, seed=3), LIKE))
    bank.load(4, prepare_streams(random_streams(HIDDEN, 4, seed=4), LIKE))
    bank.load(5, prepare_streams(random_streams(HIDDEN, 3, vocab=VOCAB, seed=5), LIKE))
    bank.load(6, None)
    return bank


def found(heads: list[OwnHead]) -> list[tuple[int, int, list[int]]]:
    """(slot, stream, rows) of each head."""
    names = {
        float(head[0, 0]): (slot, k)
        for slot, count in ((3, 2), (5, 3))
        for k, head in enumerate(prepare_streams(random_streams(HIDDEN, count, vocab=VOCAB, seed=slot), LIKE).heads)
    }
    return sorted((*names[float(h.weight[0, 0])], h.rows) for h in heads)


def test_nothing_to_do_without_own_heads(bank: StreamBank) -> None:
    assert bank.own_heads([4, 4], [1, 4]) == []


def test_rows_of_each_head(bank: StreamBank) -> None:
    heads = bank.own_heads([5, 4, 3, 5], [2, 3, 2, 1])  # rows 0-1, 2-4, 5-6, 7
    assert found(heads) == [(3, 0, [5]), (3, 1, [6]), (5, 0, [0, 7]), (5, 1, [1])]


def test_an_emptied_slot_has_no_heads(bank: StreamBank) -> None:
    bank.unload(5)
    bank.unload(6)
    bank.load(5, prepare_streams(random_streams(HIDDEN, 3), LIKE))
    assert bank.own_heads([5, 4], [2, 2]) == []


class Recorder:
    """Stands for the LoRA bank: keeps what rows the shared head was used for."""

    def __init__(self) -> None:
        self.used: list[list[int]] = []

    def use(self, slots: list[int]) -> None:
        self.used.append(list(slots))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_mix_of_heads_against_float64(bank: StreamBank, bias: bool, dtype: torch.dtype) -> None:
    """Own and shared rows alike get the base's bias, scaling and soft cap."""
    torch.manual_seed(0)
    member = nn.Linear(HIDDEN, VOCAB, bias=bias).to(dtype)
    config = SimpleNamespace(final_logit_softcapping=3.0, logit_scale=2.0)
    lora = Recorder()
    head = Head(member, "lm_head", member.weight.data, config, cast(AdapterBank, cast(Any, lora)))
    slots, counts = [5, 4, 3], [2, 3, 2]
    own = [OwnHead(o.weight.to(dtype), o.rows) for o in bank.own_heads(slots, counts)]
    states = torch.randn(7, HIDDEN).to(dtype)
    per_row = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    with torch.inference_mode():
        logits = head.drafts(states, per_row, own)
    assert logits.dtype is dtype
    assert lora.used == [[4, 4, 4]]
    weights = [member.weight.detach()] * 7
    for one in own:
        for row in one.rows:
            weights[row] = one.weight
    plain = torch.stack([w.double() @ s.double() for w, s in zip(weights, states, strict=True)])
    shift = member.bias.detach().double() if bias else 0.0
    expected = torch.tanh((plain + shift) * 2.0 / 3.0) * 3.0
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)


def test_packed_heads_score_alike() -> None:
    streams = prepare_streams(random_streams(HIDDEN, 2, vocab=VOCAB, dtype=torch.bfloat16), LIKE.bfloat16())
    packed = streams.packed()
    assert sum(t.numel() for t in packed.tensors()) == sum(t.numel() for t in streams.tensors())
    member = nn.Linear(HIDDEN, VOCAB, bias=False).bfloat16()
    head = Head(member, "lm_head", member.weight.data, SimpleNamespace(), cast(AdapterBank, cast(Any, Recorder())))
    states, slots = torch.randn(2, HIDDEN).bfloat16(), [0, 0]
    both = []
    for heads in (streams.heads, packed.heads):
        own = [OwnHead(weight, [k]) for k, weight in enumerate(heads)]
        with torch.inference_mode():
            both.append(head.drafts(states, slots, own))
    torch.testing.assert_close(both[0], both[1], rtol=0.02, atol=0.02)
