"""Where speculation pays: tokens/s at 1 … 64 requests at once, good to useless speculators, against no drafts.

The adapters, streams and all arithmetic are real; only the drafts' tokens are replaced, right ones with a given chance,
from the answers that the same adapters give without speculation. So a speculator's quality can be set, at its real cost.
All share one engine, which knows of each what it would alone.
Nothing is copied, or a useless one would not stand alone; margins are the real streams', and say nothing of forced drafts.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace
from typing import Annotated

import torch
import typer

from benchmarks.engine import names_of
from benchmarks.forced import run
from benchmarks.results import Results
from benchmarks.workload import eight_adapters, model_path, prompt_ids
from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.config import FastPath
from slipstream.engine.offline import STREAMS_ONLY, OfflineEngine, Row
from slipstream.protocol import SamplingParams

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
SPECULATORS = {"good": (0.95, 0.85, 0.75), "middling": (0.6, 0.5, 0.45), "useless": (0.02, 0.02, 0.02)}
PLAIN = "no drafts"


def with_streams(weights: AdapterWeights, count: int) -> AdapterWeights:
    """The adapter with so many streams: its first ones, or its last one several times, which is as good at what it costs."""
    assert weights.streams is not None
    every = [min(i, weights.streams.num_streams - 1) for i in range(count)]
    own = {f.name: getattr(weights.streams, f.name) for f in fields(weights.streams)}
    streams = replace(weights.streams, **{name: t[every] for name, t in own.items() if t is not None})
    return replace(weights, streams=streams)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length.")] = 32,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
    streams: Annotated[int, typer.Option(min=1, max=8, help="Of each adapter.")] = 7,
    fixed: Annotated[bool, typer.Option(help="All drafts at any load (adaptive-drafts off), for comparison.")] = False,
) -> None:
    """Turbo LoRAs with good, middling and useless speculators, at 1 to 64 requests at once."""
    torch.set_num_threads(threads)
    adapters = {name: with_streams(weights, streams) for name, weights in eight_adapters().items()}
    disable = STREAMS_ONLY if fixed else (FastPath.COPIED_DRAFTS,)
    engine = OfflineEngine(model_path(), "auto", adapters, device="cpu", disable=disable)
    scheduler = engine._core.scheduler  # a measurement's business, not an interface's
    known = {name: deepcopy(scheduler.drafting) for name in (PLAIN, *SPECULATORS)}  # what each is known for
    prompts = prompt_ids("snips", 32)
    kind = "all drafts always" if fixed else "draft length by goodput"
    results = Results("sweep-fixed" if fixed else "sweep", f"8 Turbo LoRAs, {streams} streams, {kind}", CONCURRENCY)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    with typer.progressbar(length=(rounds + 1) * len(CONCURRENCY), label="Measuring") as bar:
        for round_ in range(rounds + 1):
            for n in CONCURRENCY:
                rows = [Row(prompts[i % 32], params, name, 0) for i, name in enumerate(names_of(n))]
                scheduler.drafting = known[PLAIN]
                plain = engine.run(rows)
                found = {PLAIN: plain}
                for name, chances in SPECULATORS.items():
                    drafting = [replace(row, draft_cap=8) for row in rows]
                    scheduler.drafting = known[name]
                    found[name] = run(engine, drafting, chances, plain.answers)
                bar.update(1)
                for name, outcome in found.items():
                    if round_:  # the first round warms up, and teaches the policies
                        results.add(name, n, outcome.tokens_per_s, outcome.tokens_per_step)
    options = f"--rounds {rounds} --tokens {tokens} --streams {streams}"
    command = f"python -m benchmarks sweep {options}{' --fixed' if fixed else ''}"
    print("\n" + results.write([(name, PLAIN) for name in SPECULATORS], {"command": command}))
