"""Speculators of a set quality: drafts are replaced by right ones with a given chance, all else is the engine's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from slipstream.engine.offline import OfflineEngine, Outcome, Row
from slipstream.engine.plan import Pick, StepPlan, StepResult

TAIL = 0.75  # acceptance of the positions after the named ones


class Forced:
    """A runner whose drafts are right with given chances. Everything else is the runner's own."""

    def __init__(self, runner: Any, chances: Sequence[float]) -> None:
        self._runner = runner
        self._chances = chances
        self._random = random.Random(0)
        self.answers: dict[int, Sequence[int]] = {}  # sequence → what it will say

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, plan: StepPlan) -> StepResult:
        """One step."""
        results = dict(self._runner.run(plan).results)
        for part in plan.sequences:
            result = results.get(part.seq_id)
            if result is not None and result.guesses:
                start = part.output_index + len(result.tokens)
                coming = self.answers[part.seq_id][start : start + len(result.guesses)]
                drafts = map(self._draft, coming, range(len(coming)))
                guesses = (Pick(token, guess.margin) for token, guess in zip(drafts, result.guesses, strict=False))
                results[part.seq_id] = replace(result, guesses=tuple(guesses))
        return StepResult(results)

    def _draft(self, right: int, position: int) -> int:
        chance = self._chances[position] if position < len(self._chances) else TAIL
        return right if self._random.random() < chance else right + 1 if right == 0 else right - 1


def run(
    engine: OfflineEngine, rows: Sequence[Row], chances: Sequence[float], answers: Sequence[Sequence[int]]
) -> Outcome:
    """The rows with forced drafts; the text must be what it was without."""
    core = engine._core  # a measurement's business, not an interface's
    own, first = core.runner, engine._last_id + 1
    forced = Forced(own, chances)
    forced.answers = {first + i: answer for i, answer in enumerate(answers)}
    core.runner = forced
    try:
        outcome = engine.run(rows)
    finally:
        core.runner = own
    if engine.runner.cache.keys[0].dtype == torch.float32:
        assert outcome.answers == list(map(list, answers)), "speculation changed the text"
    return outcome
