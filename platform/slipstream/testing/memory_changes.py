"""`MemoryChanges`: the registry's `ChangeFeed` without Redis. It passes the same contract tests as `RedisChanges`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from adapter_registry.changes import Change, ChangeFeed
from slipstream.testing.memory_store import MemoryStore


class MemoryChanges(ChangeFeed):
    """What `store` told, and what is told here."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def tell(self, change: Change) -> None:
        """Tell everybody who listens."""
        self._store.tell(change)

    async def now(self) -> str:
        """A place to listen from: behind all that was told."""
        return str(len(self._store.changes))

    async def listen(self, after: str, wait_s: float) -> tuple[Sequence[Change], str]:
        """What was told after a place, and the place after that; waits up to `wait_s` for the first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while len(self._store.changes) <= int(after):
                    self._store.changed.clear()
                    await self._store.changed.wait()
        return self._store.changes[int(after) :], str(len(self._store.changes))

    async def close(self) -> None:
        """Nothing to give back."""
