"""Our autoscaling policy beside Ray Serve's default, on the shared traces: SLO misses against replica-hours.

Both see the same simulated cluster through what they would see of a real one. A replica takes `start_s` to come. A request
misses the SLO when it waits longer than `slo_s` for its place in a batch (a load of its adapter included) or its tokens come
slower than `slo_token_s`.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import typer

from benchmarks.report import table
from benchmarks.simulation.cluster import Cluster, Machine, Replica, Request
from benchmarks.simulation.plots import lines
from benchmarks.simulation.routers import Known, Ours
from benchmarks.simulation.workloads import Zipf, replay
from slipstream.cluster.scaling import Load, ScalingOptions, ScalingPolicy

LOOK_BACK_S = 10.0
REPORT_S = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """What an autoscaler is told at a tick."""

    load: Load
    now: float


class Scaler(Protocol):
    """A policy under comparison."""

    def target(self, seen: Seen) -> int:
        """Replicas from now on."""
        ...


class OurScaler:
    """`slipstream.cluster.scaling`."""

    def __init__(self, options: ScalingOptions) -> None:
        self._policy = ScalingPolicy(options)

    def target(self, seen: Seen) -> int:
        """See `Scaler`."""
        return self._policy.decide(seen.load, seen.now).replicas


class RaysDefault:
    """Ray Serve's own code: desired replicas from ongoing requests, factors and delays, at the simulation's time."""

    def __init__(self, least: int, most: int, ongoing: float, up_s: float, down_s: float) -> None:
        from ray.serve.config import AutoscalingConfig  # noqa: PLC0415 - Ray takes a second to import

        self._config: Any = AutoscalingConfig(
            min_replicas=least, max_replicas=most, target_ongoing_requests=ongoing, upscale_delay_s=up_s,
            downscale_delay_s=down_s,
        )  # fmt: skip
        self._state: dict[str, Any] = {}
        self._ongoing: deque[int] = deque(maxlen=int(self._config.look_back_period_s))

    def target(self, seen: Seen) -> int:
        """See `Scaler`."""
        from ray.serve import autoscaling_policy as rays  # noqa: PLC0415
        from ray.serve.config import AutoscalingContext  # noqa: PLC0415

        load = seen.load
        self._ongoing.append(load.ongoing + load.held)
        context: Any = AutoscalingContext(
            deployment_id=None, deployment_name="engine", app_name="app", current_num_replicas=load.replicas,
            target_num_replicas=load.target, running_replicas=[], total_num_requests=statistics.fmean(self._ongoing),
            total_queued_requests=load.held, aggregated_metrics=None, raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas, policy_state={},
            last_scale_up_time=None, last_scale_down_time=None, current_time=seen.now, config=self._config,
        )  # fmt: skip
        wanted, _ = rays._core_replica_queue_length_policy(context)
        wanted = rays._apply_scaling_factors(wanted, load.replicas, self._config)
        target, self._state = rays._apply_delay_logic(wanted, load.target, self._config, self._state, _now=seen.now)
        return int(min(self._config.max_replicas, max(self._config.min_replicas, target)))


@dataclass(slots=True)
class Run:
    """What came of it."""

    missed: float
    replica_hours: float
    changes: int
    wait_p99: float
    most: int
    at: list[float]
    replicas: list[int]
    demand: list[float]


def simulate(
    requests: Sequence[Request], scaler: Scaler, begin: int, start_s: float, slo_s: float, slo_token_s: float
) -> Run:
    """Play a workload under an autoscaler that is asked each second."""
    world = _World(begin, start_s)
    world.play(requests, scaler)
    waits = sorted(r.started - r.at for r in requests)
    late = sum(r.started - r.at > slo_s or (r.ended - r.started) / r.tokens > slo_token_s for r in requests)
    return Run(
        late / len(requests), world.seconds / 3600, world.changes, waits[int(0.99 * len(waits))], max(world.counts),
        world.times, world.counts, world.demand,
    )  # fmt: skip


class _World:
    """A cluster whose replicas come late and go when they are empty."""

    def __init__(self, begin: int, start_s: float) -> None:
        self.cluster = Cluster(Machine(), self._ended)
        self.known = Known(self.cluster)
        self.router = Ours(self.known)
        self.start_s = start_s
        self.alive: list[Replica] = [self.cluster.add(f"replica-{i}") for i in range(begin)]
        self._made = begin
        self.target = begin
        self.coming = 0
        self.seconds = 0.0
        self.changes = 0
        self.times: list[float] = []
        self.counts: list[int] = []
        self.demand: list[float] = []
        self._recent: deque[tuple[float, float]] = deque()
        self._held: list[Request] = []
        self._finished = (0, 0.0)  # requests, and their tokens: what a mean request is thought to be
        self._open = 0

    def play(self, requests: Sequence[Request], scaler: Scaler) -> None:
        def arrive(i: int) -> None:
            request = requests[i]
            self._recent.append((self.cluster.now, request.tokens))
            self._open += 1
            self._send(request)
            if i + 1 < len(requests):
                self.cluster.at(requests[i + 1].at, lambda: arrive(i + 1))

        def tick() -> None:
            self._scale(scaler)
            if self.cluster.now < requests[-1].at or self._open:
                self.cluster.at(self.cluster.now + 1.0, tick)

        self._relist()
        self.cluster.at(requests[0].at, lambda: arrive(0))
        self.cluster.at(0.0, tick)
        self.cluster.run()

    def _send(self, request: Request) -> None:
        if not self.alive:
            self._held.append(request)
            return
        name = self.router.pick(request, self.cluster.now)
        self.cluster.send(request, name)
        self.known.sent(name)

    def _ended(self, request: Request) -> None:
        self._open -= 1
        self._finished = (self._finished[0] + 1, self._finished[1] + request.tokens)
        self.known.ended(request.replica)

    def _relist(self) -> None:
        self.router.update(self.alive)

    def _scale(self, scaler: Scaler) -> None:
        now = self.cluster.now
        while self._recent and now - self._recent[0][0] > LOOK_BACK_S:
            self._recent.popleft()
        span = min(LOOK_BACK_S, max(1.0, now))
        waits = [now - r.waiting[0].at if r.waiting else 0.0 for r in self.alive]
        pressures = [(sum(n > 0 for n in r.device.values()) + len(r.coming)) / r.machine.slots for r in self.alive]
        load = Load(
            replicas=len(self.alive), target=self.target, requests_per_s=len(self._recent) / span,
            tokens_per_s=len(self._recent) / span * self._finished[1] / max(1, self._finished[0]),
            queue_wait_s=statistics.fmean(waits) if waits else 0.0,
            slot_pressure=statistics.fmean(pressures) if pressures else 0.0,
            held=len(self._held), ongoing=self._open - len(self._held),
        )  # fmt: skip
        self._follow(scaler.target(Seen(load, now)))
        if int(now) % REPORT_S == 0:
            self._relist()  # replicas report
        self.seconds += len(self.alive) + self.coming
        self.times.append(now)
        self.counts.append(len(self.alive) + self.coming)
        self.demand.append(sum(tokens for _, tokens in self._recent) / span)

    def _follow(self, target: int) -> None:
        self.changes += target != self.target
        self.target = target
        while len(self.alive) + self.coming < target:
            self.coming += 1
            self.cluster.at(self.cluster.now + self.start_s, self._arrive)
        while len(self.alive) + self.coming > target and self.alive:
            leaving = min(self.alive, key=lambda replica: replica.queue)
            self.alive.remove(leaving)  # it finishes what it has, and takes nothing new
            self._relist()

    def _arrive(self) -> None:
        self.coming -= 1
        if len(self.alive) >= self.target:
            return
        self.alive.append(self.cluster.add(f"replica-{self._made}"))
        self._made += 1
        self._relist()
        held, self._held = self._held, []
        for request in held:
            self._send(request)


def compare(
    trace: Annotated[
        str, typer.Option(help="azure_2023_conv, azure_2023_code or mooncake_conversation.")
    ] = "azure_2023_conv",
    times: Annotated[float, typer.Option(help="The trace's arrivals, this many times.")] = 4.0,
    adapters: Annotated[int, typer.Option(help="Published, drawn by Zipf(1).")] = 1000,
    start_s: Annotated[float, typer.Option(help="Until a new replica answers.")] = 30.0,
    slo_s: Annotated[float, typer.Option(help="SLO: wait for a place in a batch.")] = 1.0,
    slo_token_s: Annotated[float, typer.Option(help="SLO: seconds a token.")] = 0.15,
    utilisation: Annotated[float, typer.Option(help="Of a replica's top speed, that the target asks for.")] = 0.6,
    seconds: Annotated[float, typer.Option(help="Of the trace, from its beginning.")] = math.inf,
    only: Annotated[str, typer.Option(help="Autoscalers whose names begin so.")] = "",
) -> None:
    """SLO misses and replica-hours of our policy and of Ray Serve's default with several targets."""
    machine = Machine()
    shapes = replay(trace, 1.0, Zipf(adapters, 1.0), seconds=seconds)
    mean = statistics.fmean(request.tokens for request in shapes)
    rate = utilisation * machine.tokens_per_s / mean
    begin = max(1, round(len(shapes) * times / shapes[-1].at / rate))
    most = 40 * begin

    def ours(tokens: float | None) -> Scaler:
        return OurScaler(ScalingOptions(max_replicas=most, target_requests_per_s=rate, request_tokens=tokens))

    def rays(ongoing: float, up_s: float = 30.0, down_s: float = 600.0) -> Scaler:
        return RaysDefault(1, most, ongoing, up_s, down_s)

    scalers = {
        "ours, by tokens": ours(mean),
        "ours, by requests": ours(None),
        "Ray's default (2 ongoing)": rays(2.0),
        "Ray's, 16 ongoing": rays(16.0),
        "Ray's, 32 ongoing": rays(32.0),
        "Ray's, 32 ongoing, our delays": rays(32.0, 1.0, 120.0),
    }
    rows, curves = [], {}
    for name, scaler in scalers.items():
        if not name.startswith(only):
            continue
        requests = replay(trace, times, Zipf(adapters, 1.0), seconds=seconds)
        run = simulate(requests, scaler, begin, start_s, slo_s, slo_token_s)
        rows.append([
            name, f"{run.missed:.2%}", f"{run.replica_hours:.1f}", f"{run.wait_p99:.1f}", str(run.changes), str(run.most),
        ])  # fmt: skip
        curves[name] = (run.at, run.replicas)
        demand = (run.at, [tokens / machine.tokens_per_s for tokens in run.demand])
    print(
        f"{trace} x {times:g}: {len(shapes) * times / shapes[-1].at:.0f} requests/s, {mean:.0f} tokens of work each\n"
    )
    print(table(["autoscaler", "SLO missed", "replica-hours", "wait p99, s", "changes", "most replicas"], rows))
    name = f"scaling-{trace}" if math.isinf(seconds) and not only else f"scaling-{trace}-x{times:g}"
    lines(name, {"work that comes, in replicas": demand, **curves}, "seconds", "replicas")
