"""A running `slipstream serve` beside the engine alone: output tokens/s, time to first token, cold start of an adapter."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.load import Completion, LoadClient
from benchmarks.peers.hf import write_peft
from benchmarks.report import Series, ratio, table
from benchmarks.workload import (
    NUM_ADAPTERS,
    adapter_folder,
    eight_adapters,
    model_path,
    perturbed,
    prompt_ids,
    prompts,
)
from slipstream.adapters.save import TurboMetadata, save_turbo
from slipstream.adapters.weights import AdapterWeights
from slipstream.client import SlipstreamClient
from slipstream.engine.memory import keep_freed_memory
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.protocol import SamplingParams

CONCURRENCY = (1, 8, 32)
COLD_TOKENS = 1
PAUSE_S = 0.05
ENGINE = "engine alone"
HTTP = "over HTTP"
STREAMED = "over HTTP, streamed"


@dataclass(frozen=True)
class Traffic:
    """What is asked: prompts as text and tokens, and a fixed answer length."""

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    tokens: int

    def models(self, lora: bool, base: str, count: int) -> list[str]:
        """The model of each request."""
        return [f"bench-{i % NUM_ADAPTERS}" if lora else base for i in range(count)]


@dataclass
class Found:
    """Round by round: tokens/s by (kind, side, requests at once) and seconds to the first token at 1 by side."""

    speed: dict[tuple[str, str, int], Series] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, side: str, count: int, tokens_per_s: float) -> None:
        """One run."""
        self.speed.setdefault((kind, side, count), Series()).values.append(tokens_per_s)

    def tables(self) -> str:
        """Tokens/s and shares of the engine's own."""
        heads = [f"{n} at once" for n in CONCURRENCY]
        kinds = dict.fromkeys((kind, side) for kind, side, _ in self.speed)
        lines = [[f"{kind}, {side}", *(str(self.speed[kind, side, n]) for n in CONCURRENCY)] for kind, side in kinds]
        text = [table(["output tokens/s, median (min–max)", *heads], lines)]
        shares = [
            [
                f"{kind}, {side} / {ENGINE}",
                *(ratio(self.speed[kind, side, n], self.speed[kind, ENGINE, n]) for n in CONCURRENCY),
            ]
            for kind, side in kinds
            if side != ENGINE and (kind, ENGINE) in kinds
        ]
        text += ["", table(["share, round by round", *heads], shares)] if shares else []
        medians = {side: 1000 * statistics.median(values) for side, values in self.first.items()}
        text += ["", *(f"time to first token at 1, base, {side}: median {ms:.1f} ms" for side, ms in medians.items())]
        return "\n".join(text)


def write_turbo(weights: AdapterWeights, folder: Path) -> None:
    """Add the streams to a folder that has the LoRA."""
    base = json.loads((adapter_folder("snips") / "turbo_config.json").read_text())["base_model"]
    assert weights.streams is not None
    save_turbo(folder, weights.streams, TurboMetadata(base_model=base))


async def publish(pusher: SlipstreamClient, adapters: Mapping[str, AdapterWeights]) -> None:
    """Push Turbo LoRAs under these names."""
    for name, folder in write_peft(adapters).items():
        write_turbo(adapters[name], folder)
        await pusher.push(folder, name)


async def measure(client: LoadClient, engine: OfflineEngine | None, traffic: Traffic, rounds: int) -> Found:
    """All kinds and sides in turn at each number of requests, in each round."""
    base = await client.first_model()
    kinds = {"base": (False, False), "8 LoRAs": (True, False), "8 Turbo LoRAs": (True, True)}
    found = Found()
    with typer.progressbar(length=(rounds + 1) * len(CONCURRENCY) * len(kinds), label="Measuring") as bar:
        for round_ in range(rounds + 1):
            for n in CONCURRENCY:
                for kind, (lora, spec) in kinds.items():
                    models = traffic.models(lora, base, n)
                    sides = {}
                    if engine is not None:
                        sides[ENGINE] = alone(engine, traffic, models if lora else [None] * n, spec)
                    for side in (HTTP, STREAMED):
                        began = time.perf_counter()
                        calls = [
                            client.ask(Completion(model, text, traffic.tokens, spec, side == STREAMED))
                            for model, text in zip(models, traffic.texts, strict=False)
                        ]
                        answers = await asyncio.gather(*calls)
                        sides[side] = sum(a.tokens for a in answers) / (time.perf_counter() - began)
                    bar.update(1)
                    for side, speed in sides.items() if round_ else ():
                        found.add(kind, side, n, speed)
    await first_tokens(client, engine, traffic, base, found)
    return found


def alone(engine: OfflineEngine, traffic: Traffic, names: Sequence[str | None], spec: bool) -> float:
    """The engine's own output tokens/s on the same requests."""
    params = SamplingParams(temperature=0.0, max_tokens=traffic.tokens, ignore_eos=True)
    rows = [Row(ids, params, name, 8 if spec else 0) for ids, name in zip(traffic.ids, names, strict=False)]
    return engine.run(rows).tokens_per_s


async def first_tokens(
    client: LoadClient, engine: OfflineEngine | None, traffic: Traffic, base: str, found: Found
) -> None:
    """Time to first token, one request at a time, the sides in turn; neither while the other's threads still spin."""
    one = SamplingParams(temperature=0.0, max_tokens=1)
    for text, ids in zip(traffic.texts, traffic.ids, strict=True):
        if engine is not None:
            await asyncio.sleep(PAUSE_S)
            found.first.setdefault(ENGINE, []).append(engine.run([Row(ids, one)]).seconds)
        await asyncio.sleep(PAUSE_S)
        answered = await client.ask(Completion(base, text, 8, stream=True))
        found.first.setdefault(HTTP, []).append(answered.first_s)


async def cold_starts(client: LoadClient, pusher: SlipstreamClient, text: str, count: int) -> list[float]:
    """Seconds from an adapter's 201 to the first token of the first request that names it, each adapter new."""
    weights = eight_adapters()["snips-0"]
    fresh = {f"cold-{i}-{time.time_ns()}": perturbed(weights, 1000 + i) for i in range(count)}
    times = []
    for name, folder in write_peft(fresh).items():
        write_turbo(weights, folder)
        await pusher.push(folder, name)
        began = time.perf_counter()
        await client.ask(Completion(name, text, COLD_TOKENS, stream=True))
        times.append(time.perf_counter() - began)
    return times


def main(
    url: Annotated[str, typer.Option(envvar="SLIPSTREAM_URL")] = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(envvar="SLIPSTREAM_API_KEY")] = "",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after one to warm up.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length.")] = 48,
    cold: Annotated[int, typer.Option(help="Cold starts measured.")] = 11,
    engine: Annotated[bool, typer.Option(help="Run the engine alone beside it, in this process.")] = True,
    threads: Annotated[int, typer.Option(help="torch threads of the engine alone.")] = 2,
) -> None:
    """Over HTTP through Ray Serve, beside the engine alone. Serve with SLIPSTREAM_PREFIX_CACHING=false, for equal work."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the server does
    adapters = {f"bench-{i}": weights for i, weights in enumerate(eight_adapters().values())}
    traffic = Traffic(prompts("snips", max(CONCURRENCY)), prompt_ids("snips", max(CONCURRENCY)), tokens)
    offline = OfflineEngine(model_path(), "auto", adapters, device="cpu", disable=()) if engine else None

    async def run() -> None:
        pusher = SlipstreamClient(url, key)
        await publish(pusher, adapters)
        async with LoadClient(url, key) as client:
            found = await measure(client, offline, traffic, rounds)
            print("\n" + found.tables())
            times = sorted(1000 * s for s in await cold_starts(client, pusher, traffic.texts[0], cold))
        print(
            f"cold start, 201 to first token: median {statistics.median(times):.0f} ms ({times[0]:.0f}–{times[-1]:.0f})"
        )

    asyncio.run(run())
