"""Draft vocabularies in a whole engine: which rows pick from them, and that the text stays what it is."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import random_peft_adapter, random_streams, write_own_streams
from support.engine import Harness, Job
from support.families import tiny

from slipstream.engine.config import FastPath
from slipstream.engine.plan import Pick
from slipstream.protocol import SamplingParams

FIXED = (FastPath.ADAPTIVE_DRAFTS, FastPath.COPIED_DRAFTS)
TARGETS = {"warm": ["q_proj", "down_proj"], "cold": ["q_proj"], "on-head": ["q_proj", "lm_head"]}
PROMPT = [9, 8, 7]


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    model = tiny("llama")
    for seed, (name, targets) in enumerate(TARGETS.items()):
        random_peft_adapter(model, tmp_path / name, seed=seed, r=4, target_modules=targets)
        write_own_streams(tmp_path / name, random_streams(model.config.hidden_size, 3, seed=seed))
    return {name: tmp_path / name for name in TARGETS}


class Watched:
    """An engine of which one adapter has said enough; keeps what its head picked among, and from where."""

    def __init__(self, adapters: dict[str, Path], dtype: torch.dtype, *disable: FastPath, warm: str = "warm") -> None:
        model = tiny("llama").to(dtype)
        self.harness = Harness(model, adapters, eos=frozenset(), disable=(*FIXED, *disable))
        self.picked: list[tuple[array[int], Pick]] = []
        self.run(warm, max_tokens=200)
        head: Any = self.harness.runner._head
        best_among = head.best_among

        def watch(states: torch.Tensor, slots: Rows[int], among: Rows[array[int]]) -> list[Pick] | None:
            found: list[Pick] | None = best_among(states, slots, among)
            logits = head(states, slots)
            for ids, pick, row in zip(among, found or (), logits, strict=bool(found)):
                assert float(row[list(ids)].max()) == pytest.approx(float(row[pick.token]), rel=0.02), "the best of its ids"
                self.picked.append((ids, pick))
            return found

        head.best_among = watch

    def run(self, *names: str | None, **params: Any) -> list[list[int]]:
        asked = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params})
        return self.harness.run([Job(PROMPT, asked, name, draft_cap=3) for name in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_pick_among_what_the_adapter_said(adapters: dict[str, Path], dtype: torch.dtype) -> None:
    cut, whole = Watched(adapters, dtype), Watched(adapters, dtype, FastPath.DRAFT_VOCABULARY)
    assert cut.run("warm") == whole.run("warm")
    assert len(cut.picked) >= 9
    assert {*PROMPT} <= {*cut.picked[-1][0]}
    assert not whole.picked


def test_others_of_the_step_pick_from_all(adapters: dict[str, Path]) -> None:
    watched = Watched(adapters, torch.float32)
    mixed = watched.run("cold", "warm", None, "cold", "warm", "on-head")
    assert len(watched.picked) >= 18
    assert len({id(ids) for ids, _ in watched.picked}) <= 3, "one adapter's, as it grows"
    alone = Watched(adapters, torch.float32, FastPath.DRAFT_VOCABULARY)
    assert mixed == [alone.run(name)[0] for name in ("cold", "warm", None, "cold", "warm", "on-head")]


def test_adapters_on_the_head_and_sampled_rows_take_all_logits(adapters: dict[str, Path]) -> None:
    watched = Watched(adapters, torch.float32)
    watched.run("warm", temperature=0.8, seed=3)
    assert not watched.picked
    on_head = Watched(adapters, torch.float32, warm="on-head")
    on_head.run("on-head")
    assert not on_head.picked
