"""Where speculation pays: tokens/s at 1 … 64 requests at once, good to useless speculators, against no drafts.

The adapters, streams and all arithmetic are real; only the drafts' tokens are replaced, right ones with a given chance,
from the answers that the same adapters give without speculation. So a speculator's quality can be set, at its real cost.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine import names_of
from benchmarks.results import Results
from benchmarks.workload import ROOT, model_path, perturbed, prompt_ids
from slipstream.adapters.load import load_adapter
from slipstream.engine.config import FastPath
from slipstream.engine.offline import OfflineEngine, Outcome, Row
from slipstream.engine.plan import StepPlan, StepResult
from slipstream.protocol import SamplingParams

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
TAIL = 0.75  # acceptance of the positions after the named ones
SPECULATORS = {"good": (0.95, 0.85, 0.75), "middling": (0.6, 0.5, 0.45), "useless": (0.02, 0.02, 0.02)}
PLAIN = "no drafts"


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
            if result is not None and result.drafts:
                start = part.output_index + len(result.tokens)
                coming = self.answers[part.seq_id][start : start + len(result.drafts)]
                results[part.seq_id] = replace(result, drafts=tuple(map(self._draft, coming, range(len(coming)))))
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


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length.")] = 32,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
    fixed: Annotated[bool, typer.Option(help="All drafts at any load (adaptive-drafts off), for comparison.")] = False,
) -> None:
    """Turbo LoRAs with good, middling and useless speculators, at 1 to 64 requests at once."""
    torch.set_num_threads(threads)
    weights = load_adapter(ROOT / "examples" / "adapters" / "snips")
    adapters = {name: perturbed(weights, i) if i else weights for i, name in enumerate(names_of(8))}
    disable = (FastPath.ADAPTIVE_DRAFTS,) if fixed else ()
    engines = {
        name: OfflineEngine(model_path(), "auto", adapters, device="cpu", disable=disable) for name in SPECULATORS
    }
    prompts = prompt_ids("snips", 32)
    kind = "all drafts always" if fixed else "draft length by goodput"
    results = Results("sweep-fixed" if fixed else "sweep", f"8 Turbo LoRAs, six streams, {kind}", CONCURRENCY)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    with typer.progressbar(length=(rounds + 1) * len(CONCURRENCY), label="Measuring") as bar:
        for round_ in range(rounds + 1):
            for n in CONCURRENCY:
                rows = [Row(prompts[i % 32], params, name, 0) for i, name in enumerate(names_of(n))]
                plain = engines["good"].run(rows)
                found = {PLAIN: plain}
                for name, chances in SPECULATORS.items():
                    drafting = [replace(row, draft_cap=8) for row in rows]
                    found[name] = run(engines[name], drafting, chances, plain.answers)
                bar.update(1)
                for name, outcome in found.items():
                    if round_:  # the first round warms up, and teaches the policies
                        results.add(name, n, outcome.tokens_per_s, outcome.tokens_per_step)
    command = f"python -m benchmarks sweep --rounds {rounds} --tokens {tokens}{' --fixed' if fixed else ''}"
    print("\n" + results.write([(name, PLAIN) for name in SPECULATORS], {"command": command}))
