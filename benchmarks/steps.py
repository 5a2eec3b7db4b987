"""Where a step's time goes: the decoder, picking tokens, drafting, and the rest, by timers around each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine import CONCURRENCY, WARM_UP, Kind, Turn, slipstream, with_plain
from benchmarks.report import table
from benchmarks.workload import NUM_ADAPTERS, eight_adapters, model_path, prompt_ids
from slipstream.engine.offline import OfflineEngine
from slipstream.engine.plan import StepPlan, StepResult

PARTS = ("step", "decoder", "picking", "drafting")


class Watch:
    """Times the parts of one engine's steps; keeps those in which so many sequences decode, and nothing else."""

    def __init__(self, engine: OfflineEngine) -> None:
        self.wanted = 0  # sequences
        self.steps: list[dict[str, float]] = []  # by part, ms; and `rows` and `streams`
        self._parts: dict[str, float] = defaultdict(float)
        self._counted = {"rows": 0.0, "streams": 0.0}
        self._decodes = 0
        core: Any = engine._core
        runner: Any = engine.runner
        self._time(runner, "_forward", "decoder")
        self._time(runner._picker, "pick", "picking")
        self._time(runner._guesser, "guess", "drafting")
        run = runner.run

        def look(plan: StepPlan) -> StepResult:
            decodes = [part for part in plan.sequences if part.samples and len(part.tokens) == part.num_drafts + 1]
            self._decodes = len(decodes) if len(decodes) == len(plan.sequences) else -1
            self._counted = {"rows": plan.num_tokens, "streams": sum(part.draft_next for part in decodes)}
            result: StepResult = run(plan)
            return result

        runner.run = look
        self._time(core, "step", "step")
        step = core.step

        def keep() -> Any:
            self._parts.clear()
            outcome = step()
            if self._decodes == self.wanted:
                self.steps.append({**dict.fromkeys(PARTS, 0.0), **self._parts, **self._counted})
            return outcome

        core.step = keep

    def _time(self, owner: Any, name: str, part: str) -> None:
        work: Callable[..., object] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> object:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self._parts[part] += 1000.0 * (time.perf_counter() - began)

        setattr(owner, name, timed)


def main(
    tokens: Annotated[int, typer.Option(help="Answer length.")] = 48,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
) -> None:
    """Milliseconds of a decoding step: base, eight LoRAs, eight Turbo LoRAs at 1, 8 and 32 requests."""
    torch.set_num_threads(threads)
    engine = OfflineEngine(model_path(), "auto", with_plain(eight_adapters()), device="cpu", disable=())
    watch, prompts = Watch(engine), iter(prompt_ids("snips"))
    warm_up = prompt_ids("snips", WARM_UP * NUM_ADAPTERS, split="valid")
    slipstream(engine, 0, Kind.TURBO)(Turn(max(CONCURRENCY), (), warm_up))
    rows = []
    with typer.progressbar(length=len(CONCURRENCY) * len(Kind), label="Measuring") as bar:
        for n in CONCURRENCY:
            turn = Turn.of(n, prompts)
            for kind in Kind:
                watch.wanted, watch.steps = n, []
                _, per_step = slipstream(engine, tokens, kind)(turn)
                bar.update(1)
                medians = {part: median(step[part] for step in watch.steps) for part in PARTS}
                rest = medians["step"] - medians["decoder"] - medians["picking"] - medians["drafting"]
                counted = [mean(step[what] for step in watch.steps) for what in ("rows", "streams")]
                times = [f"{value:.1f}" for value in (*medians.values(), rest)]
                rows.append([str(n), kind, *times, *(f"{count:.1f}" for count in counted), f"{per_step:.2f}"])
    head = ["requests", "system", *PARTS, "the rest", "rows", "streams", "tokens a step"]
    print("\n" + table(head, rows))
