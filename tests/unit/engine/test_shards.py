"""Which part of a model is whose: nothing is left out, nothing is had twice but KV heads that must be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import FAMILIES, tiny
from torch import nn

from slipstream.adapters.weights import AdapterWeights, LoraModule, StreamWeights
from slipstream.engine.parallel.group import TorchGroup
from slipstream.engine.parallel.shards import UNIT, Shards, check_degree, legal_degrees, spans
from slipstream.errors import ConfigError, ModelUnsupported


@given(total=st.integers(1, 5000), size=st.integers(1, 16))
def test_spans_cover_everything_once_and_are_even(total: int, size: int) -> None:
    parts = spans(total, size)
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= math.gcd(total, UNIT)


@given(heads=st.integers(1, 64), kv=st.integers(1, 64), size=st.integers(1, 64))
def test_legal_degrees_give_each_rank_whole_heads(heads: int, kv: int, size: int) -> None:
    if size in legal_degrees(heads, kv):
        assert heads % size == 0
        assert kv % size == 0 or size % kv == 0
    else:
        with pytest.raises(ConfigError, match=f"{heads} query heads"):
            check_degree(size, heads, kv, "a model")


def test_the_default_models_degrees() -> None:
    assert legal_degrees(9, 3) == [1, 3, 9]
    with pytest.raises(ConfigError, match="use one of 1, 3, 9"):
        check_degree(2, 9, 3, "SmolLM2-135M-Instruct")


def parts_of(model: Any, size: int) -> list[Shards]:
    return [Shards.of(model.config, TorchGroup(None, rank, size), "tiny") for rank in range(size)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_parts_of_each_linear_add_up_to_it(family: str) -> None:
    """y = Σ over ranks of their columns, or their rows one after the other, in float64."""
    model = tiny(family).double()
    every = parts_of(model, 2)
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        cuts = [shards.cut(name) for shards in every]
        x = torch.randn(3, module.in_features, dtype=torch.float64)
        whole = x @ module.weight.t()
        if cuts[0].reduces:
            found = sum(cut.inputs(x) @ cut.inputs(module.weight).t() for cut in cuts)
            assert torch.allclose(whole, torch.as_tensor(found))
        else:
            assert cuts[0].rows is not None, f"{name} is on every rank"
            rows = torch.cat([cut.outputs(torch.arange(module.out_features)) for cut in cuts])
            assert sorted(rows.tolist()) == list(range(module.out_features))
            found = torch.cat([x @ cut.outputs(module.weight).t() for cut in cuts], dim=1)
            assert torch.allclose(whole[:, rows], found)


def test_more_ranks_than_kv_heads_share_them() -> None:
    every = parts_of(tiny("llama"), 4)  # 4 query heads, 2 KV heads of 16
    rows = [shards.cut("model.layers.0.self_attn.k_proj").rows for shards in every]
    assert rows == [(range(16),), (range(16),), (range(16, 32),), (range(16, 32),)]
    assert {shards.config.num_key_value_heads for shards in every} == {1}


def test_an_adapters_parts_follow_the_bases() -> None:
    model = tiny("llama")
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    down, up = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
    lora = {down: LoraModule(draw(4, 96), draw(64, 4), 2.0), up: LoraModule(draw(4, 64), draw(96, 4), 1.0, draw(96))}
    streams = StreamWeights(draw(2, 64), weight=draw(2, 64, 64), head=draw(2, 256, 64))
    parts = [shards.adapter(AdapterWeights(lora, streams)) for shards in parts_of(model, 2)]
    x = draw(3, 96)
    whole = x @ lora[down].a.t() @ lora[down].b.t()
    halves = [x[:, 48 * r : 48 * r + 48] @ p.lora[down].a.t() @ p.lora[down].b.t() for r, p in enumerate(parts)]
    assert torch.allclose(whole, halves[0] + halves[1], atol=1e-4)
    assert torch.equal(torch.cat([p.lora[up].b for p in parts]), lora[up].b)
    assert all(torch.equal(p.lora[up].a, lora[up].a) for p in parts)
    magnitudes = [p.lora[up].magnitude for p in parts]
    assert torch.equal(torch.cat([m for m in magnitudes if m is not None]), torch.as_tensor(lora[up].magnitude))
    heads = [p.streams.head for p in parts if p.streams is not None]
    assert streams.head is not None
    assert torch.equal(torch.cat([h for h in heads if h is not None], dim=1), streams.head)


def test_a_model_without_a_plan_is_refused_by_name() -> None:
    config = tiny("llama").config
    config.base_model_tp_plan = None
    with pytest.raises(ModelUnsupported, match="odd has no tensor-parallel plan"):
        Shards.of(config, TorchGroup(None, 0, 2), "odd")
