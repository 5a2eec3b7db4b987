"""What a replica does with the registry's changes: fetch what will be asked for, let go of what is gone."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn, Protocol, runtime_checkable

from adapter_registry.changes import Change, ChangeFeed
from adapter_registry.errors import StoreUnavailable
from deployments.adapter_source import BlobAdapterSource
from slipstream.protocol import AdapterRef

log = logging.getLogger("ray.serve")
_WAIT_S = 30.0  # for the next change
_PAUSE_S = 2.0  # while the registry is away


@runtime_checkable
class KeepsAdapters(Protocol):
    """An engine that can be told beforehand."""

    async def prefetch(self, ref: AdapterRef, instead_of: str) -> None:
        """Fetch an adapter that is likely to be asked for soon, if the one that it replaces is here."""
        ...

    async def forget(self, ref: AdapterRef) -> None:
        """Let go of an adapter as soon as nobody uses it, unless another tenant has the same one here."""
        ...


async def follow(feed: ChangeFeed, engine: KeepsAdapters, source: BlobAdapterSource) -> NoReturn:
    """Until cancelled. What is told while the registry is away is read when it is back."""
    place: str | None = None
    while True:
        try:
            if place is None:
                place = await feed.now()
            changes, place = await feed.listen(place, _WAIT_S)
        except StoreUnavailable:
            await asyncio.sleep(_PAUSE_S)
            continue
        except Exception:  # likewise
            log.exception("following changes failed")
            await asyncio.sleep(_PAUSE_S)
            continue
        for change in changes:
            try:
                await _take(change, engine, source)
            except Exception as error:  # a task's top loop: nobody else would hear of it, and the next one may be fine
                log.warning("a change of %s was not followed: %s: %s", change.tenant, type(error).__name__, error)


async def _take(change: Change, engine: KeepsAdapters, source: BlobAdapterSource) -> None:
    if change.coming is not None and change.instead_of is not None:
        await engine.prefetch(AdapterRef(change.tenant, change.coming), change.instead_of)
    if change.gone is not None:
        await engine.forget(AdapterRef(change.tenant, change.gone))
        await source.forget(AdapterRef(change.tenant, change.gone))
