"""Recent answers of the registry, so that a short outage of it does not stop requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from adapter_registry.errors import NotPublished, StoreUnavailable

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentAnswers(Generic[K, V]):
    """A bounded cache: answers younger than `fresh_s` are reused, older ones only while the store is away.

    Only positive answers are kept: a key made a moment ago must work at once, and guesses fill no cache.
    """

    def __init__(self, *, fresh_s: float, stale_s: float, limit: int, clock: Callable[[], float]) -> None:
        self._fresh_s = fresh_s
        self._stale_s = stale_s
        self._limit = limit
        self._clock = clock
        self._kept: dict[K, tuple[float, V]] = {}  # oldest first

    async def ask(self, key: K, fetch: Callable[[], Awaitable[V | None]]) -> V | None:
        """The answer to `key`, from `fetch` unless a fresh one is kept."""
        kept = self._kept.get(key)
        if kept is not None and self._clock() - kept[0] < self._fresh_s:
            return kept[1]
        try:
            value = await fetch()
        except StoreUnavailable:
            if kept is not None and self._clock() - kept[0] < self._stale_s:
                return kept[1]
            raise
        except NotPublished:
            self._kept.pop(key, None)
            raise
        self._kept.pop(key, None)
        if value is not None:
            self._remember(key, value)
        return value

    def forget(self, unwanted: Callable[[V], bool]) -> None:
        """Drop the answers for which `unwanted` is true."""
        for key in [key for key, (_, value) in self._kept.items() if unwanted(value)]:
            del self._kept[key]

    def _remember(self, key: K, value: V) -> None:
        if len(self._kept) >= self._limit:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = (self._clock(), value)
