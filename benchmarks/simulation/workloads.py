"""Requests over time: Zipf adapters, Poisson arrivals, and the shared traces."""

from __future__ import annotations

import csv
import math
import random
from bisect import bisect
from itertools import accumulate

from benchmarks.simulation.cluster import Request
from benchmarks.workload import SHARED
from slipstream.protocol import work


class Zipf:
    """Draws adapters; the i-th most popular has weight 1 / i^s."""

    def __init__(self, count: int, exponent: float, seed: int = 0) -> None:
        self._sums = list(accumulate(1 / (i + 1) ** exponent for i in range(count)))
        self._rng = random.Random(seed)

    def draw(self) -> str:
        """An adapter's name."""
        return f"adapter-{bisect(self._sums, self._rng.random() * self._sums[-1])}"


def lengths(trace: str) -> list[tuple[float, int, int]]:
    """(seconds, prompt tokens, answer tokens) of a shared trace."""
    with (SHARED / "data" / "traces" / f"{trace}.csv").open(encoding="utf-8") as lines:
        return [(float(r["time_s"]), int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(lines)]


def poisson(rate: float, seconds: float, adapters: Zipf, seed: int = 0) -> list[Request]:
    """Arrivals at a mean rate, with lengths of the Azure conversation trace."""
    rng, found, now = random.Random(seed), list[Request](), 0.0
    shapes = lengths("azure_2023_conv")
    while (now := now + rng.expovariate(rate)) < seconds:
        _, prompt, output = rng.choice(shapes)
        found.append(Request(now, work(prompt, output), adapters.draw()))
    return found


def replay(trace: str, times: float, adapters: Zipf, seed: int = 0, seconds: float = math.inf) -> list[Request]:
    """A shared trace's first `seconds` with `times` its arrivals: each row again, moved by up to half a minute, with a
    neighbour's lengths."""
    rng, rows = random.Random(seed), [row for row in lengths(trace) if row[0] < seconds]
    found = []
    for at, _, _ in rows:
        for _ in range(int(times) + (rng.random() < times % 1)):
            _, prompt, output = rng.choice(rows)
            found.append(Request(max(0.0, at + rng.uniform(-30, 30)), work(prompt, output), adapters.draw()))
    return sorted(found, key=lambda request: request.at)
