"""Totals that only grow, as rates over the last seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Rates:
    """Of several totals that are observed together."""

    def __init__(self, window_s: float = 10.0, least_s: float = 5.0) -> None:
        """`least_s`: a shorter time says nothing; what came in it counts as if it had come in so long."""
        self._window_s, self._least_s = window_s, least_s
        self._seen: deque[tuple[float, tuple[float, ...]]] = deque()

    def per_s(self, now: float, *totals: float) -> Sequence[float]:
        """Note the totals as of `now` (seconds) and return what each grew by a second; 0 at the first call."""
        self._seen.append((now, totals))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._window_s:
            self._seen.popleft()
        then, before = self._seen[0]
        span = max(now - then, self._least_s)
        return [(total - old) / span for total, old in zip(totals, before, strict=True)]
