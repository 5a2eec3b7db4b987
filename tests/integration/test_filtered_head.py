"""The best token without all logits, in a whole engine: which steps go that way, and that the text stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import turbo_folders
from support.engine import Harness, Job
from support.families import tiny

from slipstream.engine.config import FastPath
from slipstream.engine.native import ops
from slipstream.engine.native.build import library
from slipstream.protocol import SamplingParams

FIXED = FastPath.ADAPTIVE_DRAFTS
TARGETS = {"turbo": ["q_proj", "down_proj"], "on-head": ["q_proj", "lm_head"]}


@pytest.fixture(autouse=True)
def _has_kernel() -> None:
    found = library()
    if found is None or not found.slipstream_has_filter():
        pytest.skip("no compiler, or a processor without AVX512-VNNI")


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    return turbo_folders(tiny("llama"), tmp_path, TARGETS)


class Counted:
    """A harness that counts what its head was asked for: rows whose best token it told, and rows of logits."""

    def __init__(self, adapters: dict[str, Path], *disable: FastPath) -> None:
        self.harness = Harness(tiny("llama").to(torch.bfloat16), adapters, eos=frozenset(), disable=(FIXED, *disable))
        self.told = self.logits = 0
        self.without: range = range(0)  # rows of each call whose best token it does not tell
        head: Any = self.harness.runner._head
        greedy, member = head._greedy, head._member

        def tell(hidden: torch.Tensor) -> list[int | None]:
            found = [None if row in self.without else token for row, token in enumerate(greedy(hidden))]
            self.told += sum(token is not None for token in found)
            return found

        def score(hidden: torch.Tensor) -> torch.Tensor:
            self.logits += len(hidden)
            return member(hidden)  # type: ignore[no-any-return]

        head._member = score
        if greedy is not None:
            head._greedy = tell

    def run(self, count: int, adapter: str | None = None, draft_cap: int = 0, **params: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(5)
        prompts = torch.randint(3, 200, (count, 6), generator=generator).tolist()
        asked = SamplingParams(**{"temperature": 0.0, "max_tokens": 10, **params})
        self.told = self.logits = 0
        return self.harness.run([Job(prompt, asked, adapter, draft_cap) for prompt in prompts])


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize(("adapter", "draft_cap"), [(None, 0), ("turbo", 0), ("turbo", 3)])
def test_greedy_rows_need_no_logits(adapters: dict[str, Path], adapter: str | None, draft_cap: int, count: int) -> None:
    with_it, without = Counted(adapters), Counted(adapters, FastPath.FILTERED_HEAD)
    assert with_it.run(count, adapter, draft_cap) == without.run(count, adapter, draft_cap)
    assert with_it.told >= 10
    assert with_it.logits == 0, "drafts included"
    assert without.logits >= 10


def test_a_row_that_it_cannot_tell_takes_all_logits_alone(adapters: dict[str, Path]) -> None:
    counted = Counted(adapters)
    expected = counted.run(5, "turbo", 3)
    counted.without = range(1, 3)
    assert counted.run(5, "turbo", 3) == expected
    assert 10 <= counted.logits < counted.told


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7, "seed": 1},
        {"logprobs": 2},
        {"logit_bias": {7: 3.0}},
        {"repetition_penalty": 1.2},
        {"min_tokens": 10},
    ],
    ids=lambda params: next(iter(params)),
)
def test_what_is_asked_for_more_than_the_best_takes_all_logits(
    adapters: dict[str, Path], params: dict[str, Any]
) -> None:
    counted = Counted(adapters)
    counted.run(1, **params)
    assert counted.logits >= 9
    assert counted.told <= int("min_tokens" in params), "the step after them"


def test_adapters_on_the_head_take_all_logits(adapters: dict[str, Path]) -> None:
    counted = Counted(adapters)
    counted.run(1, "on-head", 3)
    assert counted.told == 0
    assert counted.logits >= 10


def test_drafts_come_from_the_streams_kernel(adapters: dict[str, Path]) -> None:
    assert Counted(adapters).harness.runner._streams._states is ops.stream_states
