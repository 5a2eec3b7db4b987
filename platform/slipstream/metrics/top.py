"""Label values without end, bounded: the most used have a label of their own, all others share one.

Adapters and tenants come and go by the thousand; a label for each would fill any Prometheus. A value gets its name when it
is among the most used of the last minutes. Where all names are taken, a much busier one takes that of the least used, and
not often: what was counted under the old name is forgotten with it, never added to `other`. So a series that is exposed
never falls; one that comes back begins at zero, which Prometheus takes for a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

OTHER = "other"
TRACKED = 8  # values counted for each name there is
TIMES = 2.0  # as busy as the least used name, to take its place: two alike do not take turns


class TopLabels:
    """Decides who has a name. Owned by one thread; others may read."""

    def __init__(
        self,
        limit: int,
        clock: Callable[[], float],
        *,
        name: Callable[[str], str] = str,
        half_life_s: float = 600.0,
        swap_every_s: float = 60.0,
    ) -> None:
        """`limit` names at once beside `OTHER`, one new one in `swap_every_s` once all are taken. `name` makes the label of a
        value, which is shown only if it is not `OTHER` itself. Uses count half after `half_life_s`."""
        assert limit > 0
        self._limit, self._clock, self._name = limit, clock, name
        self._half_life_s, self._swap_every_s = half_life_s, swap_every_s
        self._names: dict[str, str] = {}  # value → label
        self._scores: dict[str, tuple[float, float]] = {}  # value → uses, as of when
        self._swapped = -swap_every_s
        self._forgetters: list[Callable[[str], object]] = []

    def on_forget(self, forget: Callable[[str], object]) -> None:
        """Have `forget` called with each label that is given up: its series must go."""
        self._forgetters.append(forget)

    def label(self, value: str) -> str:
        """The label it has now."""
        return self._names.get(value, OTHER)

    def named(self) -> Iterable[tuple[str, str]]:
        """Values that have a label of their own, and it."""
        return list(self._names.items())

    def note(self, value: str) -> str:
        """One more use of a value; the label it has after that."""
        now = self._clock()
        score = self._count(value, now)
        if value not in self._names and self._name(value) != OTHER:
            if len(self._names) < self._limit:
                self._names[value] = self._name(value)
            elif now - self._swapped >= self._swap_every_s:
                self._maybe_swap(value, score, now)
        return self.label(value)

    def _maybe_swap(self, value: str, score: float, now: float) -> None:
        coldest = min(self._names, key=lambda each: self._score(each, now))
        if score <= TIMES * self._score(coldest, now):
            return
        self._swapped = now
        label = self._names.pop(coldest)
        for forget in self._forgetters:
            forget(label)
        self._names[value] = self._name(value)

    def _score(self, value: str, now: float) -> float:
        score, at = self._scores.get(value, (0.0, now))
        return float(score * 0.5 ** ((now - at) / self._half_life_s))

    def _count(self, value: str, now: float) -> float:
        """Space-Saving (Metwally et al. 2005) with decay: a value that is not counted yet takes the least one's place and
        score, so that memory is bounded and a busy value cannot be missed."""
        score = self._score(value, now)
        if value not in self._scores and len(self._scores) >= TRACKED * self._limit:
            least = min(self._scores, key=lambda each: self._score(each, now))
            score = self._score(least, now)
            del self._scores[least]
        self._scores[value] = (score + 1.0, now)
        return score + 1.0


def short_digest(digest: str) -> str:
    """An adapter's label: the first twelve digits of its digest, as in `system_fingerprint`."""
    return digest.removeprefix("sha256:")[:12]
