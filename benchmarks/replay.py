"""Open-loop load: a stretch of the Azure LLM trace replayed against a running `slipstream serve`; goodput under an SLO.

Arrivals keep their pattern and are sped up or slowed down to a mean rate; lengths are scaled to what a processor can serve.
Trace: Azure LLM inference trace 2023 (Splitwise, ISCA 2024). A request is good when all its tokens come in time.
"""

from __future__ import annotations

import asyncio
import csv
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks.http import publish
from benchmarks.load import Completion, LoadClient, Refused
from benchmarks.report import table
from benchmarks.workload import NUM_ADAPTERS, SHARED, eight_adapters, prompt_ids
from slipstream.client import SlipstreamClient


@dataclass(frozen=True)
class Arrival:
    """One request of the trace. at: seconds from the start; lengths in tokens."""

    at: float
    prompt: int
    output: int
    adapter: int


@dataclass(frozen=True)
class Served:
    """What came of it: seconds to the first token and between tokens, both infinite when it was refused."""

    first_s: float
    token_s: float
    tokens: int


@dataclass(frozen=True)
class Slo:
    """Seconds to the first token, and on average between tokens."""

    first_s: float
    token_s: float

    def holds(self, served: Served) -> bool:
        """Whether a request was good."""
        return served.first_s <= self.first_s and served.token_s <= self.token_s


def arrivals(trace: str, rate: float, seconds: float, scale: float) -> list[Arrival]:
    """The trace's beginning at a mean rate (requests/s), lengths times `scale`; adapters drawn by Zipf(1)."""
    with (SHARED / "data" / "traces" / f"azure_2023_{trace}.csv").open(encoding="utf-8") as lines:
        rows = [(float(r["time_s"]), int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(lines)]
    rows = rows[: int(rate * seconds)]
    speed = rows[-1][0] / seconds
    draw = random.Random(0)
    weights = [1 / (i + 1) for i in range(NUM_ADAPTERS)]
    return [
        Arrival(at / speed, max(8, int(prompt * scale)), max(4, int(output * scale)), adapter)
        for (at, prompt, output), adapter in zip(
            rows, draw.choices(range(NUM_ADAPTERS), weights, k=len(rows)), strict=True
        )
    ]


async def send(client: LoadClient, arrival: Arrival, text: Sequence[int], spec: bool) -> Served:
    """One streamed request; what the server refuses counts as not served."""
    prompt = list(text[: arrival.prompt])
    try:
        answered = await client.ask(Completion(f"bench-{arrival.adapter}", prompt, arrival.output, spec, stream=True))
    except Refused:
        return Served(float("inf"), float("inf"), 0)
    later_s = answered.last_s - answered.first_s
    return Served(answered.first_s, later_s / max(1, answered.tokens - 1), answered.tokens)


async def replay(
    client: LoadClient, plan: Sequence[Arrival], text: Sequence[int], spec: bool, first_token: int
) -> list[Served]:
    """All requests at their times, whatever became of those before.

    Their first tokens count up from `first_token`: no prompt begins like another, so the prefix cache has nothing to give.
    """
    began = time.perf_counter()

    async def one(i: int, arrival: Arrival) -> Served:
        await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
        return await send(client, arrival, [first_token + i, *text], spec)

    return await asyncio.gather(*(one(i, arrival) for i, arrival in enumerate(plan)))


def line(name: str, rate: float, served: Sequence[Served], seconds: float, slo: Slo) -> list[str]:
    """One row of the table."""
    done = [s for s in served if s.tokens]
    good = sum(map(slo.holds, served))

    def at(values: list[float], q: float) -> str:
        return f"{1000 * sorted(values)[min(len(values) - 1, int(q * len(values)))]:.0f}" if values else "–"

    first, token = [s.first_s for s in done], [s.token_s for s in done]
    return [
        f"{rate:g}", name, f"{len(served)} / {len(done)}", at(first, 0.5), at(first, 0.99), at(token, 0.5), at(token, 0.99),
        f"{good / seconds:.2f} ({good / len(served):.0%})", f"{statistics.mean(s.tokens for s in served):.0f}",
    ]  # fmt: skip


def main(
    url: Annotated[str, typer.Option(envvar="SLIPSTREAM_URL")] = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(envvar="SLIPSTREAM_API_KEY")] = "",
    trace: Annotated[str, typer.Option(help="conv or code.")] = "conv",
    rates: Annotated[str, typer.Option(help="Mean requests/s, comma-separated.")] = "0.5,1,1.5,2",
    seconds: Annotated[float, typer.Option(help="Length of each replay.")] = 45.0,
    scale: Annotated[float, typer.Option(help="Of prompt and answer lengths.")] = 0.125,
    slo_first: Annotated[float, typer.Option(help="SLO: seconds to the first token.")] = 2.0,
    slo_token: Annotated[float, typer.Option(help="SLO: seconds between tokens, average of a request.")] = 0.2,
) -> None:
    """The Azure trace, open-loop, LoRAs and Turbo LoRAs in turn."""
    slo = Slo(slo_first, slo_token)
    text = [token for ids in prompt_ids("snips", 200) for token in ids]

    async def run() -> list[list[str]]:
        await publish(SlipstreamClient(url, key), {f"bench-{i}": w for i, w in enumerate(eight_adapters().values())})
        rows: list[list[str]] = []
        first_token = 1000
        async with LoadClient(url, key) as client:
            for rate in map(float, rates.split(",")):
                plan = arrivals(trace, rate, seconds, scale)
                for name, spec in (("8 LoRAs", False), ("8 Turbo LoRAs", True)):
                    rows.append(line(name, rate, await replay(client, plan, text, spec, first_token), seconds, slo))
                    first_token += len(plan)
        return rows

    head = ["offered req/s", "adapters", "sent / served", "TTFT p50, ms", "p99", "between tokens p50, ms", "p99"]
    head += [f"good req/s (TTFT ≤ {slo_first:g} s, {1000 * slo_token:g} ms a token)", "tokens an answer"]
    print(table(head, asyncio.run(run())))
