"""Our router beside round-robin, power of two choices and sticky hashing, on simulated replicas."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks.report import table
from benchmarks.simulation.cluster import Cluster, Machine, Replica, Request
from benchmarks.simulation.plots import bars
from benchmarks.simulation.routers import Known, Ours, PowerOfTwo, RoundRobin, Router, Sticky
from benchmarks.simulation.workloads import Zipf, poisson
from slipstream.cluster.routing import AdapterRouting, ReplicaView, RouteKey, Tier

GATEWAYS = 4
REPORT_S = 1.0  # between two reports of a replica
ROUTERS: dict[str, Callable[[Known], Router]] = {
    "ours": Ours,
    "round-robin": RoundRobin,
    "power of two": PowerOfTwo,
    "sticky by hash": Sticky,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a router made of a workload. Seconds; loads a minute and replica."""

    hit_rate: float
    wait_p50: float
    wait_p99: float
    slowdown_p99: float
    loads: float
    fairness: float
    busiest: float


def simulate(requests: Sequence[Request], replicas: int, make: Callable[[Known], Router]) -> Outcome:
    """Play a workload; the first fifth warms up."""
    views: list[tuple[Router, Known]] = []
    sender: dict[int, Known] = {}
    cluster = Cluster(Machine(), lambda request: sender.pop(id(request)).ended(request.replica))
    for i in range(replicas):
        cluster.add(f"replica-{i}")
    for _ in range(GATEWAYS):
        known = Known(cluster)
        views.append((make(known), known))

    def report() -> None:
        for router, _ in views:
            router.update(list(cluster.replicas.values()))
        if cluster.now < requests[-1].at:
            cluster.at(cluster.now + REPORT_S, report)

    def arrive(i: int) -> None:
        router, known = views[i % GATEWAYS]
        name = router.pick(requests[i], cluster.now)
        sender[id(requests[i])] = known
        cluster.send(requests[i], name)
        known.sent(name)
        if i + 1 < len(requests):
            cluster.at(requests[i + 1].at, lambda: arrive(i + 1))

    report()
    cluster.at(requests[0].at, lambda: arrive(0))
    cluster.run()
    return judge(requests[len(requests) // 5 :], list(cluster.replicas.values()), requests[-1].at)


def judge(requests: Sequence[Request], found: Sequence[Replica], seconds: float) -> Outcome:
    """The figures of a run. Slowdown: time from arrival to end, over the time on a replica with nothing else on it."""
    machine = Machine()
    waits = sorted(request.started - request.at for request in requests)
    slow = sorted((r.ended - r.at) / (r.tokens * machine.step_s(1)) for r in requests)
    per_adapter: dict[str, list[float]] = defaultdict(list)
    for request in requests:
        per_adapter[str(request.adapter)].append((request.ended - request.at) / (request.tokens * machine.step_s(1)))
    means = [statistics.fmean(values) for values in per_adapter.values()]
    work_of: dict[str, float] = defaultdict(float)
    for request in requests:
        work_of[request.replica] += request.tokens
    return Outcome(
        hit_rate=statistics.fmean(request.hit for request in requests),
        wait_p50=waits[len(waits) // 2],
        wait_p99=waits[int(len(waits) * 0.99)],
        slowdown_p99=slow[int(len(slow) * 0.99)],
        loads=sum(replica.loads for replica in found) / len(found) / (seconds / 60),
        fairness=sum(means) ** 2 / (len(means) * sum(value * value for value in means)),
        busiest=max(work_of.values()) / (sum(work_of.values()) / len(found)),
    )


def compare(
    seconds: Annotated[float, typer.Option(help="Of simulated time.")] = 300.0,
    load: Annotated[float, typer.Option(help="Offered work, of what all replicas can do.")] = 0.7,
    sizes: Annotated[str, typer.Option(help="replicas:adapters, comma-separated.")] = "4:200,16:1000,100:5000",
    exponent: Annotated[float, typer.Option(help="Of the Zipf distribution of adapters.")] = 1.0,
) -> None:
    """Hit rate, waits, loads, fairness of four routers."""
    rows, charts = [], {}
    for size in sizes.split(","):
        replicas, adapters = map(int, size.split(":"))
        shapes = poisson(50.0, 100.0, Zipf(adapters, exponent))
        mean = statistics.fmean(request.tokens for request in shapes)
        rate = load * replicas * Machine().tokens_per_s / mean
        for name, make in ROUTERS.items():
            out = simulate(poisson(rate, seconds, Zipf(adapters, exponent)), replicas, make)
            rows.append([
                f"{replicas} / {adapters}", name, f"{out.hit_rate:.1%}", f"{1000 * out.wait_p50:.0f}",
                f"{1000 * out.wait_p99:.0f}",
                f"{out.slowdown_p99:.1f}", f"{out.loads:.1f}", f"{out.fairness:.2f}", f"{out.busiest:.2f}",
            ])  # fmt: skip
            charts[f"{size}, {name}"] = out
    head = [
        "replicas / adapters",
        "router",
        "found on the device",
        "wait p50, ms",
        "p99",
        "slowdown p99",
        "loads/min a replica",
    ]
    print(table([*head, "fairness (Jain)", "busiest / mean"], rows))
    panels = {
        "requests that found their adapter": {name: out.hit_rate for name, out in charts.items()},
        "wait p99, s": {name: out.wait_p99 for name, out in charts.items()},
        "adapter loads a minute and replica": {name: out.loads for name, out in charts.items()},
    }
    bars("routing", panels)


def cost(
    decisions: Annotated[int, typer.Option(help="Decisions timed, for each number of replicas.")] = 20000,
) -> None:
    """What one decision costs the gateway, at 1, 100 and 1,000 replicas that each hold 32 of 5,000 adapters."""
    rows = []
    for replicas in (1, 100, 1000):
        rng, zipf = random.Random(0), Zipf(5000, 1.0)
        tiers = [{zipf.draw(): Tier.ON_DEVICE for _ in range(32)} for _ in range(replicas)]
        views = [ReplicaView(f"replica-{i}", tiers[i]) for i in range(replicas)]
        policy, queues = AdapterRouting(rng=random.Random(0)), {v.name: rng.randrange(40) for v in views}
        began = time.perf_counter()
        policy.update(views)
        update = time.perf_counter() - began
        keys = [RouteKey(zipf.draw()) for _ in range(decisions)]
        gc.disable()
        took = []
        for i, key in enumerate(keys):
            began = time.perf_counter()
            policy.rank(key, queues.__getitem__, i * 0.001)
            took.append(time.perf_counter() - began)
        gc.enable()
        took.sort()
        micro = [f"{1e6 * took[int(q * len(took))]:.0f}" for q in (0.5, 0.99)]
        rows.append([str(replicas), *micro, f"{1e3 * update:.2f}"])
    print(table(["replicas", "decision p50, µs", "p99, µs", "taking in a report, ms"], rows))
