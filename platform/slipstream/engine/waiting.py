"""How long a new request would wait, so that one that would wait too long is told at once. Pure Python."""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 10.0
LEAST_S = 1.0  # of a queue, before its speed means anything


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
