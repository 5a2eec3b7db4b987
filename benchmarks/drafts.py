"""Tokens per step with argmax drafts, against drafts that share the verification's noise (docs/decisions/0001)."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from benchmarks.report import table
from benchmarks.workload import TASKS, adapter_folder, model_path, prompt_ids
from slipstream.adapters.load import load_adapter
from slipstream.engine.guessing import Guesser
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.engine.plan import PlannedSequence
from slipstream.protocol import SamplingParams


class NoisyGuesser(Guesser):
    """Guesses picked by the very function, and the very noise, that verifies them."""

    def colder(self, part: PlannedSequence) -> PlannedSequence:
        """See `Guesser`: no colder."""
        return part


def main(count: Annotated[int, typer.Option(help="Prompts of each task.")] = 50) -> None:
    """Tokens per step at several temperatures; the texts of both sides are compared as well."""
    torch.set_num_threads(2)
    adapters = {task: load_adapter(adapter_folder(task)) for task in TASKS}
    engine = OfflineEngine(model_path(), "bfloat16", adapters, device="cpu")
    prompts = {task: prompt_ids(task, count) for task in TASKS}
    rows = []
    for task in TASKS:
        for temperature in (0.0, 0.5, 0.8, 1.0, 1.3):
            outcomes = []
            for kind in (Guesser, NoisyGuesser):
                engine.runner._guesser.__class__ = kind
                batch = [
                    Row(p, SamplingParams(temperature=temperature, seed=i, max_tokens=64), task, 8)
                    for i, p in enumerate(prompts[task])
                ]
                outcomes.append(engine.run(batch))
            argmax, shared = outcomes
            same = sum(a == b for a, b in zip(shared.answers, argmax.answers, strict=True))
            rows.append(
                [
                    task,
                    f"{temperature}",
                    f"{argmax.tokens_per_step:.2f}",
                    f"{shared.tokens_per_step:.2f}",
                    f"{same}/{count}",
                ]
            )
    print(table(["task", "temperature", "argmax", "shared noise", "same text"], rows))
