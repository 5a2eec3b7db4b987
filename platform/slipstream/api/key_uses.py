"""When keys were last used: noted now and then beside the requests, which do not wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from adapter_registry.errors import RegistryError
from adapter_registry.keys import KeyRecord
from adapter_registry.store import Store

EVERY_S = 60.0  # for each key
_KEPT = 4096


class KeyUses:
    """Owned by one application."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._noted: dict[str, float] = {}  # oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    def note(self, key: KeyRecord) -> None:
        """It is being used."""
        now = self._clock()
        if now - self._noted.get(key.id, float("-inf")) < EVERY_S:
            return
        self._noted.pop(key.id, None)
        self._noted[key.id] = now
        if len(self._noted) > _KEPT:
            del self._noted[next(iter(self._noted))]
        task = asyncio.ensure_future(self._write(key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, key: KeyRecord) -> None:
        try:
            await self._store.note_key_use(key.tenant, key.id)
        except RegistryError:
            return  # the next minute's is as good
