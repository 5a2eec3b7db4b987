"""Throughput as the number of published adapters grows: 8 to 1,000 under Zipf(1), through the whole engine service.

Adapters come as they do in a replica: fetched into a scratch folder, read, checked, laid out, copied into a slot. Every
published adapter has a digest of its own; its files are one of eight, which no part of the engine knows.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.peers.hf import write_peft
from benchmarks.report import Series, ratio, table
from benchmarks.workload import eight_adapters, model_path, prompt_ids
from slipstream.engine.config import EngineConfig
from slipstream.engine.service import EngineService
from slipstream.protocol import AdapterRef, GenerateRequest, SamplingParams

PUBLISHED = (8, 64, 512, 1000)
AT_ONCE = 32
DISTINCT = 8  # adapters of a wave


class Published:
    """An `AdapterSource` of any number of adapters; counts how many were fetched."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self.fetched = 0

    async def fetch(self, ref: AdapterRef, destination: Path) -> None:
        """Copy the files, as from a blob store on this machine."""
        self.fetched += 1
        source = self._folders[int(ref.digest[-8:], 16) % len(self._folders)]
        await asyncio.to_thread(partial(shutil.copytree, source, destination, dirs_exist_ok=True))


@dataclass
class Load:
    """Requests on adapters drawn by Zipf(1) from `published`."""

    engine: EngineService
    prompts: Sequence[Sequence[int]]
    tokens: int
    published: int
    adapters_by: random.Random
    prompts_by: random.Random  # the same ones come in the same order, however many adapters are published
    in_flight: dict[int, int] = field(default_factory=dict)
    distinct: list[int] = field(default_factory=list)  # adapters in flight, at each request's start

    def draw(self) -> int:
        """One adapter: number i with a chance of 1/i."""
        ranks = range(1, self.published + 1)
        return self.adapters_by.choices(ranks, [1 / r for r in ranks])[0]

    async def ask(self, adapter: int) -> None:
        """One request to its end."""
        self.in_flight[adapter] = self.in_flight.get(adapter, 0) + 1
        self.distinct.append(len(self.in_flight))
        request = GenerateRequest(
            request_id=str(self.adapters_by.random()),
            tenant="bench",
            params=SamplingParams(temperature=0.0, max_tokens=self.tokens, ignore_eos=True),
            token_ids=tuple(self.prompts_by.choice(self.prompts)),
            adapter=AdapterRef("bench", f"sha256:{adapter:064x}"),
            speculation=False,
        )
        async for _ in self.engine.generate(request):
            pass
        self.in_flight[adapter] -= 1
        if not self.in_flight[adapter]:
            del self.in_flight[adapter]

    async def waves(self, requests: int) -> float:
        """Output tokens/s of waves of `AT_ONCE` requests, `DISTINCT` different adapters in each, evenly."""
        began = time.perf_counter()
        for _ in range(requests // AT_ONCE):
            adapters: dict[int, None] = {}
            while len(adapters) < DISTINCT:
                adapters[self.draw()] = None
            wave = [a for a in adapters for _ in range(AT_ONCE // DISTINCT)]
            await asyncio.gather(*map(self.ask, wave))
        return requests * self.tokens / (time.perf_counter() - began)

    async def closed(self, requests: int) -> float:
        """Output tokens/s of `AT_ONCE` clients that draw anew after each answer."""
        left = requests

        async def client() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.ask(self.draw())

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
        return requests * self.tokens / (time.perf_counter() - began)


async def measure(config: EngineConfig, rounds: int, tokens: int, requests: int) -> str:
    """All numbers of adapters in turn, in each round."""
    source = Published(list(write_peft(eight_adapters()).values()))
    engine = EngineService(config, source)
    await engine.start()
    prompts = prompt_ids("snips", 64)
    kinds: dict[str, Callable[[Load, int], Awaitable[float]]] = {"waves": Load.waves, "closed": Load.closed}
    speed = {(kind, n): Series() for kind in kinds for n in PUBLISHED}
    fetched = dict.fromkeys(speed, 0)
    distinct: dict[tuple[str, int], float] = {}
    try:
        with typer.progressbar(length=(rounds + 1) * len(speed), label="Measuring") as bar:
            for round_ in range(rounds + 1):
                for (kind, n), series in speed.items():
                    load = Load(engine, prompts, tokens, n, random.Random(round_), random.Random(round_))
                    before = source.fetched
                    found = await kinds[kind](load, requests)
                    bar.update(1)
                    if round_:
                        series.values.append(found)
                        fetched[kind, n] += source.fetched - before
                        distinct[kind, n] = sum(load.distinct) / len(load.distinct)
    finally:
        await engine.close()
    rows = [
        [
            kind,
            str(n),
            str(series),
            ratio(series, speed[kind, PUBLISHED[0]]),
            f"{distinct[kind, n]:.1f}",
            f"{fetched[kind, n] / (rounds * requests):.2f}",
        ]
        for (kind, n), series in speed.items()
    ]
    head = ["load", "published", "output tokens/s", f"of {PUBLISHED[0]}'s", "distinct in flight", "loads a request"]
    return table(head, rows)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after one to warm up.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length.")] = 48,
    requests: Annotated[int, typer.Option(help="Requests of a run, a multiple of 32.")] = 128,
    slots: Annotated[int, typer.Option(help="adapter_slots of the replica.")] = 32,
    host_mib: Annotated[int, typer.Option(help="Host memory for adapters, MiB.")] = 1024,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
) -> None:
    """8 to 1,000 published adapters under Zipf(1): waves of eight distinct ones, and 32 clients in a closed loop."""
    torch.set_num_threads(threads)
    path = model_path()
    config = EngineConfig(
        model_id=path.name, model_path=str(path), adapter_slots=slots, host_adapter_bytes=host_mib << 20,
        num_threads=threads, prefix_caching=False,
    )  # fmt: skip
    print("\n" + asyncio.run(measure(config, rounds, tokens, requests)))
