"""What a gateway does for rollouts: it counts what becomes of requests of watched aliases, and sends copies to shadows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from adapter_registry.errors import NotPublished, StoreUnavailable
from adapter_registry.records import Outcome, Watch
from adapter_registry.store import Store
from adapter_registry.tenants import UsageCounts
from slipstream.api.catalog import Catalog, Target
from slipstream.api.generation import Generation
from slipstream.api.metering import Meter
from slipstream.api.metrics import HttpMetrics
from slipstream.errors import ClientError, SlipstreamError
from slipstream.protocol import GenerateRequest

log = logging.getLogger("slipstream.api")

TELL_EVERY_S = 1.0
MAX_SHADOWS = 16  # at once, of one gateway; requests beyond have none
SHADOW_PRIORITY = 1_000_000  # behind everything else of its tenant
SHADOW_MAX_WAIT_S = 2.0  # an engine that is busier has no time for copies


class Outcomes:
    """Gathers them, and brings them to the store every second: one write for each alias and version."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._gathered: dict[tuple[Watch, int], Outcome] = {}

    def note(self, target: Target, counts: UsageCounts, error: Exception | None, same: bool | None = None) -> None:
        """One request has ended. What a client did wrong, or was refused, says nothing about a version."""
        if target.watch is None or target.version is None or isinstance(error, ClientError):
            return
        if error is None and not counts.requests:  # its client went away before it began
            return
        outcome = Outcome(
            requests=1,
            errors=int(error is not None),
            drafted_tokens=counts.drafted_tokens,
            accepted_tokens=counts.accepted_tokens,
            compared=int(same is not None),
            same=int(bool(same)),
        )
        place = (target.watch, target.version.version)
        self._gathered[place] = self._gathered.get(place, Outcome()).plus(outcome)

    async def tell(self) -> None:
        """Once. What the store does not take now it is offered again."""
        gathered, self._gathered = self._gathered, {}
        for (watch, version), outcome in gathered.items():
            try:
                reason = await self._store.note_outcome(watch, version, outcome)
            except NotPublished:  # the adapter is gone
                continue
            except StoreUnavailable:
                kept = self._gathered.get((watch, version), Outcome())
                self._gathered[watch, version] = kept.plus(outcome)
                continue
            if reason:
                log.warning("%s/%s@%s was rolled back: %s", watch.tenant, watch.name, watch.alias, reason)

    async def keep_telling(self) -> NoReturn:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            try:
                await self.tell()
            except Exception:  # a loop's top: outcomes must go on being counted
                log.exception("counting outcomes failed")


class Shadows:
    """Copies of requests, answered by an alias's shadow. They are not charged beforehand and wait behind everything else."""

    def __init__(
        self, catalog: Catalog, meter: Meter, outcomes: Outcomes, metrics: HttpMetrics, timeout_s: float
    ) -> None:
        self._catalog, self._meter, self._outcomes = catalog, meter, outcomes
        self._metrics, self._timeout_s = metrics, timeout_s
        self._running: set[asyncio.Task[None]] = set()

    def send(self, target: Target, requests: Sequence[GenerateRequest], answered: Generation) -> None:
        """Copy a request whose answer has begun, if its target has a shadow."""
        if target.shadow is None or len(self._running) >= MAX_SHADOWS:
            return
        task = asyncio.create_task(self._answer(target, requests, answered))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """End those that run."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _answer(self, target: Target, requests: Sequence[GenerateRequest], answered: Generation) -> None:
        try:
            shadow = await self._catalog.shadow_of(target)
            assert shadow is not None  # `send` saw to it
            copies = [
                replace(
                    request,
                    request_id=f"{request.request_id}-shadow",
                    adapter=shadow.adapter,
                    stream=False,
                    priority=SHADOW_PRIORITY,
                    max_wait_s=SHADOW_MAX_WAIT_S,
                )
                for request in requests
            ]
            used: list[tuple[UsageCounts, Exception | None]] = []
            generation = Generation(shadow, copies, self._timeout_s, self._metrics, lambda *ended: used.append(ended))
            try:
                await generation.start()
                await generation.collect()
            except SlipstreamError:
                pass  # `used` has it
            finally:
                await generation.aclose()
            counts, error = used[0]
            self._meter.count(copies[0].request_id, copies[0].tenant, f"{shadow.served_as} (shadow)", counts)
            theirs, ours = await answered.texts(), await generation.texts()
            self._outcomes.note(shadow, counts, error, None if None in (theirs, ours) else theirs == ours)
        except Exception as error:  # a task's top: nobody waits for it
            log.warning("a shadow of %s failed: %s: %s", target.served_as, type(error).__name__, error)
