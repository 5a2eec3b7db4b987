"""How long a new request would wait, so that one that would wait too long is told at once. Pure Python."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from slipstream.errors import InvalidRequest, Overloaded
from slipstream.protocol import EngineStats, GenerateRequest

WINDOW_S = 10.0
LEAST_S = 1.0  # of a queue, before its speed means anything
LONGEST_RETRY_S = 60


class StartRate:
    """Sequences started a second, measured while others wait: without a queue it tells how many came, not how many could."""

    def __init__(self) -> None:
        # (when, starts so far), since the queue began or the window did
        self._marks: deque[tuple[float, int]] = deque()
        self._began = 0.0  # when the queue did
        self._running = 0

    def observe(self, now: float, waiting: int, started: int, running: int) -> None:
        """After each step: how many still wait, the starts so far, and how many run."""
        self._running = running
        if not waiting:
            self._marks.clear()
            return
        if not self._marks:
            self._began = now
        self._marks.append((now, started))
        while now - self._marks[0][0] > WINDOW_S and len(self._marks) > 2:
            self._marks.popleft()

    @property
    def per_s(self) -> float | None:
        """None while nobody waits, or not for long enough."""
        if not self._marks:
            return None
        (since, before), (until, after) = self._marks[0], self._marks[-1]
        if until - since < LEAST_S:
            return None
        if after == before:  # none of those that run has ended yet: no more than this is known
            return self._running / (until - self._began)
        return (after - before) / (until - since)


def predicted_wait_s(ahead: int, starts_per_s: float | None) -> float:
    """Seconds until `ahead` others have started; 0 while nothing is known."""
    if starts_per_s is None or ahead <= 0:
        return 0.0
    return ahead / starts_per_s if starts_per_s > 0 else math.inf


def too_late(allowed_s: float, retry_after_s: int = 1) -> Overloaded:
    """What a request is told that would wait longer, or has."""
    message = f"This replica is too busy to begin the request within {allowed_s:g} seconds. Try again later."
    return Overloaded(message, retry_after_s=retry_after_s)


def starts_before(request: GenerateRequest, count: int, own: int, total: int, stats: EngineStats) -> int:
    """Sequences that start before a request's: all of its own tenant's, and as many of each other's as are due to them.

    own, total: open sequences of its tenant, and of all, some of them not yet in `stats`.
    """
    unseen = max(0, total - stats.running - stats.waiting)
    unseen_own = unseen * own // total if total else 0
    queued = Counter[tuple[str, float]]()
    for q in stats.queue:
        if q.tenant != request.tenant or q.priority <= request.priority:
            queued[q.tenant, q.weight] += q.count
    mine = unseen_own + sum(n for (tenant, _), n in queued.items() if tenant == request.tenant)
    turns = (mine + count) / request.weight
    others = sum(
        min(n, math.ceil(turns * weight)) for (tenant, weight), n in queued.items() if tenant != request.tenant
    )
    return mine + others + min(unseen - unseen_own, math.ceil(turns))


@dataclass(frozen=True, slots=True)
class Gate:
    """Whom one engine lets in."""

    max_open: int  # sequences that run or wait
    max_wait_s: float

    def allowed_wait_s(self, request: GenerateRequest) -> float:
        """How long a request may wait for its start."""
        return self.max_wait_s if request.max_wait_s is None else min(self.max_wait_s, request.max_wait_s)

    def check(self, request: GenerateRequest, count: int, open_: Mapping[str, int], stats: EngineStats) -> None:
        """Refuse at once what would wait too long; a request that another replica has begun is let in.

        count: its sequences; open_: those of each tenant, also of requests that came since `stats`. A tenant that has less
        than an equal share of the room is let in though others have filled it: there are never twice as many as `max_open`.
        Raises `InvalidRequest` for what could never be let in, `Overloaded` for what cannot be now.
        """
        if count > self.max_open:
            raise InvalidRequest(f"This replica takes {self.max_open} sequences at most; n is over that.", param="n")
        if request.progress:
            return
        total, own = sum(open_.values()), open_.get(request.tenant, 0)
        ahead = starts_before(request, count, own, total, stats)
        expected_s, allowed_s = predicted_wait_s(ahead + count, stats.starts_per_s), self.allowed_wait_s(request)
        retry_s = math.ceil(min(LONGEST_RETRY_S, max(1.0, expected_s - allowed_s)))
        share = self.max_open // len({*open_, request.tenant})
        if total + count > self.max_open and (own + count > share or total + count > 2 * self.max_open):
            message = f"{total} sequences are queued or running, which is this replica's limit. Try again."
            raise Overloaded(message, retry_after_s=retry_s)
        if expected_s > allowed_s:
            raise too_late(allowed_s, retry_s)
