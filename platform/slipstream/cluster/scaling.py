"""How many replicas a deployment should have. Pure Python: the caller brings observations and the time.

Demand is counted in requests a second against what one replica is meant to take. Requests of different length are made
comparable by their tokens: with `request_tokens` set, a request counts as much as it has tokens of work, in units of so many.
Two things bound the answer from below whatever the rate says: how long requests wait, and adapters that wait for a slot. Up
goes at once; down only to the most that was wanted during the last `down_delay_s`, and not within `cool_down_s` of going up.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

MAX_GROWTH = 2.0  # waiting requests and adapters at most double the replicas in one decision


@dataclass(frozen=True, slots=True)
class ScalingOptions:
    """What an operator chooses. Rates are per replica."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_requests_per_s: float = 2.0
    request_tokens: float | None = None  # tokens of work in the request that the target means; None = all count alike
    max_queue_wait_s: float = 2.0  # longer waits ask for more replicas
    max_slot_pressure: float = 1.0  # adapters in use or wanted, per slot
    up_delay_s: float = 1.0  # how long more must be wanted
    down_delay_s: float = 120.0
    to_zero_delay_s: float = 300.0  # without any request
    cool_down_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """One observation of a deployment. Rates and waits are of the last few seconds."""

    replicas: int  # that answer
    target: int  # that were asked for
    requests_per_s: float  # arrivals at all replicas
    tokens_per_s: float = 0.0  # work of those requests, prompt tokens weighed
    queue_wait_s: float = 0.0  # of the request that waits longest, averaged over replicas
    slot_pressure: float = 0.0  # the mean over replicas
    held: int = 0  # requests that wait for a replica in front of them
    ongoing: int = 0  # requests on replicas


class Cause(StrEnum):
    """What a number of replicas follows from; the reason says it with figures."""

    RATE = "rate"  # requests or tokens a second
    QUEUE_WAIT = "queue_wait"
    SLOT_PRESSURE = "slot_pressure"  # adapters per slot
    HELD = "held"  # requests that no replica takes
    IDLE = "idle"
    LIMITS = "limits"  # the least or the most that there may be


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas, and why, in words."""

    replicas: int
    reason: str
    cause: Cause = Cause.RATE


class ScalingPolicy:
    """The memory of one deployment's decisions."""

    def __init__(self, options: ScalingOptions) -> None:
        self.options = options
        self._wanted: deque[tuple[float, int]] = deque()  # (when, replicas), falling: the window's maximum comes first
        self._more_since: float | None = None
        self._went_up: float = float("-inf")
        self._busy = 0.0  # when there was last anything to do
        self._began: float | None = None
        self._floor = 0  # replicas below which requests waited too long, not long ago …
        self._floor_at = 0.0  # … or since when one fewer is being tried

    def decide(self, load: Load, now: float) -> Decision:
        """The next target. `now`: seconds, never falling."""
        o = self.options
        wanted, why, cause = self._want(load, now)
        if self._began is None:
            self._began = now
        coming = load.target > load.replicas  # somebody asked for them: not asleep again before they are there
        if load.ongoing or load.held or load.requests_per_s > 0 or coming or self._began == now:
            self._busy = now
        if load.target == 0 and wanted == 0:
            return Decision(0, "asleep: no requests", Cause.IDLE)
        floor = 0 if wanted == 0 and now - self._busy >= o.to_zero_delay_s else 1
        wanted = min(o.max_replicas, max(o.min_replicas, floor, wanted))
        self._note(wanted, now)
        if not o.min_replicas <= load.target <= o.max_replicas:
            cause = Cause.LIMITS
        if wanted > load.target:
            return self._up(wanted, why, cause, load, now)
        self._more_since = None
        if wanted < load.target:
            return self._down(wanted, why, cause, load, now)
        return Decision(load.target, f"steady: {why}", cause)

    def _want(self, load: Load, now: float) -> tuple[int, str, Cause]:
        """Replicas for this load alone, and what asks for them."""
        o = self.options
        demand = load.requests_per_s
        if o.request_tokens is not None:
            demand = max(load.tokens_per_s / o.request_tokens, 0.0)
        best = math.ceil(round(demand / o.target_requests_per_s, 6))
        why, cause = f"{demand:.2f} requests/s at {o.target_requests_per_s:g} a replica", Cause.RATE
        if load.held and not load.replicas:
            return max(1, best), f"{load.held} requests wait for a first replica", Cause.HELD
        most = max(load.replicas + 1, math.floor(load.replicas * MAX_GROWTH))
        if load.queue_wait_s > o.max_queue_wait_s:
            needed = min(most, math.ceil(load.replicas * load.queue_wait_s / o.max_queue_wait_s))
            self._floor, self._floor_at = max(self._floor, needed), now
            if needed > best:
                best, why = needed, f"requests wait {load.queue_wait_s:.1f} s, over {o.max_queue_wait_s:g}"
                cause = Cause.QUEUE_WAIT
        self._lower_floor(load, now)
        if self._floor > best:
            best, why = self._floor, f"with fewer than {self._floor} requests waited over {o.max_queue_wait_s:g} s"
            cause = Cause.QUEUE_WAIT
        needed = min(most, math.ceil(round(load.replicas * load.slot_pressure / o.max_slot_pressure, 6)))
        if needed > best:
            best, why = needed, f"{load.slot_pressure:.2f} adapters a slot, of {o.max_slot_pressure:g}"
            cause = Cause.SLOT_PRESSURE
        if load.held and load.replicas + 1 > best:
            best, why = load.replicas + 1, f"{load.held} requests find no room on a replica"
            cause = Cause.HELD
        if load.ongoing:
            best = max(1, best)
        return best, why, cause

    def _lower_floor(self, load: Load, now: float) -> None:
        """What waits once taught is forgotten one replica at a time, and at once when nobody asks any more."""
        if not load.ongoing and not load.held and load.requests_per_s == 0:
            self._floor = 0
        elif self._floor and now - self._floor_at >= self.options.down_delay_s:
            self._floor, self._floor_at = self._floor - 1, now

    def _up(self, wanted: int, why: str, cause: Cause, load: Load, now: float) -> Decision:
        if self._more_since is None:
            self._more_since = now
        if load.target and now - self._more_since < self.options.up_delay_s:
            return Decision(load.target, f"about to grow to {wanted}: {why}", cause)
        self._went_up, self._more_since = now, None
        return Decision(wanted, why, cause)

    def _down(self, wanted: int, why: str, cause: Cause, load: Load, now: float) -> Decision:
        o, most = self.options, self._wanted[0][1]
        assert self._began is not None
        if now - self._went_up < o.cool_down_s:
            return Decision(load.target, f"cooling down: {why}", cause)
        if wanted == 0 and load.target == 1:
            return Decision(0, f"no request for {o.to_zero_delay_s:g} s", Cause.IDLE)
        if most >= load.target or now - self._began < o.down_delay_s:
            return Decision(load.target, f"waiting out {o.down_delay_s:g} s: {why}", cause)
        return Decision(max(1, most), why, cause)

    def _note(self, wanted: int, now: float) -> None:
        while self._wanted and self._wanted[-1][1] <= wanted:
            self._wanted.pop()
        self._wanted.append((now, wanted))
        while now - self._wanted[0][0] > self.options.down_delay_s:
            self._wanted.popleft()
