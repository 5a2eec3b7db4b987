"""Long prompts among running requests (gaps between tokens, paced and not), and prompts that share a prefix."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

import torch
import typer

from benchmarks.report import Series, ratio, table
from benchmarks.workload import model_path, prompt_ids
from slipstream.engine.memory import keep_freed_memory
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.engine.pacing import PromptPacer
from slipstream.engine.sequence import Sequence
from slipstream.protocol import SamplingParams

MAX_BATCHED_TOKENS = 512
SHARED_PREFIX = 1024  # tokens, as a long system prompt has


@dataclass
class Gaps:
    """Seconds between tokens of running requests, and what the long prompts waited."""

    alone: list[float] = field(default_factory=list)  # no long prompt in the engine
    among: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # long prompt → its first token

    def line(self) -> list[str]:
        median, p99 = statistics.median(self.alone), quantile(self.among, 0.99)
        figures = [1000 * median, 1000 * statistics.median(self.among), 1000 * p99, 1000 * max(self.among)]
        return [*(f"{f:.0f}" for f in figures), f"{p99 / median:.2f}", f"{statistics.median(self.first):.1f}"]


def quantile(values: list[float], q: float) -> float:
    """The value that a share `q` of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def gaps(engine: OfflineEngine, pacer: PromptPacer | None, runners: int, long: int, prompts: int, found: Gaps) -> None:
    """`runners` requests decode; one after the other `prompts` long prompts come, with a pause of eight steps between."""
    core = engine._core  # a measurement's business, not an interface's
    core.scheduler.pacer = pacer
    text = [token for ids in prompt_ids("snips", 200) for token in ids]
    short, greedy = prompt_ids("snips", runners), SamplingParams(temperature=0.0, max_tokens=4000)
    short_ids, first_id = set(), engine._last_id + 1
    engine._last_id += runners + prompts

    def add(seq_id: int, prompt: list[int], answer: int) -> None:
        core.add(Sequence(seq_id, "bench", greedy, prompt, len(prompt), len(prompt) + answer, frozenset()))

    for i, prompt in enumerate(short):
        short_ids.add(first_id + i)
        add(first_id + i, prompt, 4000)
    waiting, pause, arrived = prompts, 8, 0.0
    with torch.inference_mode():
        core.step()  # prefill
        while waiting or arrived or pause:
            if not arrived and not pause:
                waiting -= 1
                arrived = time.perf_counter()
                add(first_id + runners + waiting, text[waiting : waiting + long], 1)
            began = time.perf_counter()
            emissions = core.step().emissions
            now = time.perf_counter()
            (found.among if arrived else found.alone).append(now - began)
            if any(e.seq_id not in short_ids for e in emissions):
                found.first.append(now - arrived)
                arrived, pause = 0.0, 9
            pause = max(0, pause - 1)
        for seq_id in short_ids:
            core.abort(seq_id)
    core.scheduler.pacer = None


def shared_prefix(engine: OfflineEngine, ends: list[list[int]]) -> tuple[float, float, int]:
    """Requests with one long prefix: (output tokens/s, seconds to the first token of one more alone, cached tokens)."""
    prefix = [token for ids in prompt_ids("snips", 100) for token in ids][:SHARED_PREFIX]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    before = engine._core.scheduler.counters.prefix_hit_tokens
    rows = [Row(prefix + ids, params) for ids in ends]
    outcome = engine.run(rows, concurrency=8)
    one = engine.run([Row([*rows[-1].prompt[:-1], 7], SamplingParams(temperature=0.0, max_tokens=1))])
    return outcome.tokens_per_s, one.seconds, engine._core.scheduler.counters.prefix_hit_tokens - before


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after one to warm up.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a long prompt.")] = 4096,
    runners: Annotated[int, typer.Option(help="Requests that decode meanwhile.")] = 8,
    prompts: Annotated[int, typer.Option(help="Long prompts a round.")] = 3,
    stretch: Annotated[float, typer.Option(help="long_prompt_stretch.")] = 2.5,
    requests: Annotated[int, typer.Option(help="Requests that share a prefix.")] = 24,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
) -> None:
    """Gaps between tokens while long prompts arrive; prefix cache on a shared prefix."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the service does
    engine = OfflineEngine(
        model_path(), "auto", device="cpu", max_batched_tokens=MAX_BATCHED_TOKENS, kv_cache_bytes=1 << 31
    )
    sides = {"chunks of 512": None, f"paced, stretch {stretch}": PromptPacer(stretch)}
    found = {name: Gaps() for name in sides}
    for round_ in range(rounds + 1):
        for name, pacer in sides.items():
            gaps(engine, pacer, runners, length, prompts if round_ else 1, found[name] if round_ else Gaps())
    head = ["ms between tokens", "alone, p50", "among, p50", "among, p99", "longest", "p99 / p50 alone", "long TTFT, s"]
    print(table(head, [[name, *gap.line()] for name, gap in found.items()]))
    speeds = {name: Series() for name in ("no cache", "prefix cache")}
    firsts = {name: Series() for name in speeds}
    hits, ends = 0, iter(prompt_ids("snips")[100:])  # new ones each time: only the prefix is to be found
    for _ in range(rounds):
        for name, series in speeds.items():
            engine._core.scheduler.prefix_caching = name == "prefix cache"
            speed, first, hits = shared_prefix(engine, list(islice(ends, requests)))
            series.values.append(speed)
            firsts[name].values.append(1000 * first)
    lines = [[name, str(speeds[name]), str(firsts[name])] for name in speeds]
    print(
        "\n"
        + table([f"{requests} requests, {SHARED_PREFIX} tokens shared", "output tokens/s", "TTFT alone, ms"], lines)
    )
    print(
        f"\nspeed {ratio(speeds['prefix cache'], speeds['no cache'])}; {hits} prompt tokens found in the cache a round"
    )
