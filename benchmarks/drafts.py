"""Tokens per step with drafts that share the verification's noise, against argmax drafts (docs/decisions/0001)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
import typer

from benchmarks.report import table
from benchmarks.workload import TASKS, adapter_folder, model_path, prompt_ids
from slipstream.adapters.load import load_adapter
from slipstream.engine.batch import StepBatch
from slipstream.engine.guessing import Guesser, Guesses
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.protocol import SamplingParams


class ArgmaxDrafts(Guesser):
    """The usual way: the most likely token, whatever the temperature."""

    def guess(
        self, batch: StepBatch, sampled: torch.Tensor, decided: Sequence[Sequence[int]], broken: Sequence[bool]
    ) -> Guesses:
        """See `Guesser`."""
        cold = [(replace(part, params=replace(part.params, temperature=0.0)), first) for part, first in batch.spans]
        return super().guess(replace(batch, spans=tuple(cold)), sampled, decided, broken)


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
            for kind in (Guesser, ArgmaxDrafts):
                engine.runner._guesser.__class__ = kind
                batch = [
                    Row(p, SamplingParams(temperature=temperature, seed=i, max_tokens=64), task, 8)
                    for i, p in enumerate(prompts[task])
                ]
                outcomes.append(engine.run(batch))
            shared, argmax = outcomes
            same = sum(a == b for a, b in zip(shared.answers, argmax.answers, strict=True))
            rows.append(
                [
                    task,
                    f"{temperature}",
                    f"{shared.tokens_per_step:.2f}",
                    f"{argmax.tokens_per_step:.2f}",
                    f"{same}/{count}",
                ]
            )
    print(table(["task", "temperature", "shared noise", "argmax", "same text"], rows))
