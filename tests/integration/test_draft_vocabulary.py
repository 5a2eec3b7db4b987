"""Draft vocabularies in a whole engine: which rows pick from them, and that the text stays what it is."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import turbo_folders
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
    return turbo_folders(tiny("llama"), tmp_path, TARGETS)


class Watched:
    """An engine of which some adapters have said enough; keeps what its head picked among, and from where."""

    def __init__(
        self, adapters: dict[str, Path], dtype: torch.dtype, *disable: FastPath, warm: Rows[str] = ("warm",)
    ) -> None:
        model = tiny("llama").to(dtype)
        self.harness = Harness(model, adapters, eos=frozenset(), disable=(*FIXED, *disable))
        self.picked: list[tuple[array[int], Pick]] = []
        self.same = self.comparable = 0  # picks that would have been the same from all ids
        asked = SamplingParams(temperature=0.0, max_tokens=200)
        self.harness.run([Job([*PROMPT, *range(20, 90)], asked, name, draft_cap=3) for name in warm])
        picker: Any = self.harness.runner._picker
        among = picker.among

        def watch(wanted: Rows[array[int]], states: torch.Tensor) -> list[Pick]:
            found: list[Pick] = among(wanted, states)
            best = picker.head(states, [0] * len(wanted)).argmax(dim=1).tolist()  # whose adapters are not on the head
            for ids, pick, token in zip(wanted, found, best, strict=True):
                assert pick.token in ids
                if token in ids:
                    self.same += pick.token == token
                    self.comparable += 1
                self.picked.append((ids, pick))
            return found

        picker.among = watch

    def run(self, *names: str | None, **params: Any) -> list[list[int]]:
        asked = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params})
        return self.harness.run([Job(PROMPT, asked, name, draft_cap=3) for name in names])


SAMPLED = {"temperature": 0.8, "seed": 3}
NUCLEUS = {**SAMPLED, "top_p": 0.9, "top_k": 40}


@pytest.mark.parametrize("params", [{}, SAMPLED, NUCLEUS], ids=["greedy", "sampled", "nucleus"])
@pytest.mark.parametrize("disable", [(), (FastPath.NATIVE_KERNELS,)], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_pick_among_what_the_adapter_said(
    adapters: dict[str, Path], dtype: torch.dtype, disable: tuple[FastPath, ...], params: dict[str, Any]
) -> None:
    cut = Watched(adapters, dtype, *disable)
    whole = Watched(adapters, dtype, *disable, FastPath.DRAFT_VOCABULARY)
    assert cut.run("warm", max_tokens=40, **params) == whole.run("warm", max_tokens=40, **params)
    assert len(cut.picked) >= 9
    assert {*PROMPT} <= {*cut.picked[-1][0]}
    assert cut.same >= 0.95 * cut.comparable, "all but ties"
    assert cut.comparable >= 3
    assert not whole.picked


def test_others_of_the_step_pick_from_all(adapters: dict[str, Path]) -> None:
    names = ("cold", "warm", None, "cold", "warm", "on-head")
    watched = Watched(adapters, torch.float32, warm=("warm", "on-head"))
    alone = Watched(adapters, torch.float32, FastPath.DRAFT_VOCABULARY)
    assert watched.run(*names) == [alone.run(name)[0] for name in names]
    assert len(watched.picked) >= 18
    assert len({id(ids) for ids, _ in watched.picked}) <= 3, "one adapter's, as it grows"


@pytest.mark.parametrize(
    "params",
    [{"logit_bias": {7: 3.0}}, {"repetition_penalty": 1.2}, {"min_tokens": 12}],
    ids=lambda each: next(iter(each)),
)
def test_what_changes_logits_first_takes_all_of_them(adapters: dict[str, Path], params: dict[str, Any]) -> None:
    watched = Watched(adapters, torch.float32)
    watched.run("warm", **params)
    assert not watched.picked


def test_vocabularies_that_are_together_no_less_than_all_ids_are_not_asked(adapters: dict[str, Path]) -> None:
    watched = Watched(adapters, torch.float32, warm=["warm", "cold"])
    watched.run("warm", "cold")
    few = len(watched.picked)
    assert len({id(ids) for ids, _ in watched.picked}) >= 2
    watched.harness.runner._picker.sampler.vocab_size = 1
    watched.run("warm", "cold")
    assert len(watched.picked) == few > 0


def test_an_adapter_on_the_head_takes_all_logits(adapters: dict[str, Path]) -> None:
    watched = Watched(adapters, torch.float32, warm=["on-head"])
    watched.run("on-head")
    assert not watched.picked
