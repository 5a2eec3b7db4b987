"""Where speculation pays: tokens/s at 1 … 64 requests at once, good to useless speculators, against no drafts.

The adapters, streams and all arithmetic are real; only the drafts' tokens are replaced, right ones with a given chance,
from the answers that the same adapters give without speculation. So a speculator's quality can be set, at its real cost.
Nothing is copied, or a useless one would not stand alone; margins are the real streams', and say nothing of forced drafts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
import typer

from benchmarks.engine import names_of
from benchmarks.forced import run
from benchmarks.results import Results
from benchmarks.workload import ROOT, model_path, perturbed, prompt_ids
from slipstream.adapters.load import load_adapter
from slipstream.engine.config import FastPath
from slipstream.engine.offline import STREAMS_ONLY, OfflineEngine, Row
from slipstream.protocol import SamplingParams

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
SPECULATORS = {"good": (0.95, 0.85, 0.75), "middling": (0.6, 0.5, 0.45), "useless": (0.02, 0.02, 0.02)}
PLAIN = "no drafts"


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
    disable = STREAMS_ONLY if fixed else (FastPath.COPIED_DRAFTS,)
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
