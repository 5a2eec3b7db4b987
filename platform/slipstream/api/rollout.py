"""What a gateway does for rollouts: it counts what becomes of requests of watched aliases, and sends copies to shadows."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapter_registry.errors import NotPublished, StoreUnavailable
from adapter_registry.records import Outcome, Watch
from adapter_registry.store import Store
from slipstream.api.catalog import Catalog, Target
from slipstream.api.generation import Ending, Generation
from slipstream.api.metering import Meter
from slipstream.errors import ClientError, SlipstreamError
from slipstream.metrics.gateway import GatewayMetrics
from slipstream.protocol import GenerateRequest

log = logging.getLogger("slipstream.api")

TELL_EVERY_S = 1.0
MAX_SHADOWS = 16  # answers at once, of one gateway; requests beyond have none
MAX_COMPARISONS = 256  # shadows that have answered and wait for the answer that they are compared with
MAX_UNTOLD = 10_000  # alias and version and second, while the store is away
SHADOW_PRIORITY = 1_000_000  # behind everything else of its tenant
SHADOW_MAX_WAIT_S = 2.0  # an engine that is busier has no time for copies


@dataclass(frozen=True, slots=True)
class _Told:
    """What is on its way to the store, under an id: told twice it counts once."""

    id: str
    watch: Watch
    version: int
    outcome: Outcome


class Outcomes:
    """Gathers them, and brings them to the store every second: one write for each alias and version."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._gathered: dict[tuple[Watch, int], Outcome] = {}
        self._telling: deque[_Told] = deque(maxlen=MAX_UNTOLD)

    def note(self, target: Target, ending: Ending) -> None:
        """One request has ended. What a client did wrong, was refused or did not wait for says nothing about a version."""
        if target.watch is None or target.version is None or isinstance(ending.error, ClientError):
            return
        if ending.error is None and not ending.whole:  # its client left
            return
        outcome = Outcome(
            requests=1,
            errors=int(ending.error is not None),
            drafted_tokens=ending.judged_tokens,
            accepted_tokens=ending.right_tokens,
        )
        self._add(target.watch, target.version.version, outcome)

    def compare(self, target: Target, same: bool) -> None:
        """A shadow's answer and the caller's are both complete."""
        assert target.watch is not None
        assert target.version is not None
        self._add(target.watch, target.version.version, Outcome(compared=1, same=int(same)))

    def _add(self, watch: Watch, version: int, outcome: Outcome) -> None:
        self._gathered[watch, version] = self._gathered.get((watch, version), Outcome()).plus(outcome)

    async def tell(self) -> None:
        """Once. What the store does not take now it is offered again."""
        gathered, self._gathered = self._gathered, {}
        for (watch, version), outcome in gathered.items():
            self._telling.append(_Told(secrets.token_hex(8), watch, version, outcome))
        while self._telling:
            told = self._telling[0]
            try:
                reason = await self._store.note_outcome(told.watch, told.version, told.outcome, told.id)
            except StoreUnavailable:
                return
            except NotPublished:  # the adapter is gone
                reason = ""
            if self._telling and self._telling[0] is told:
                self._telling.popleft()
            if reason:
                log.warning(
                    "%s/%s@%s was rolled back: %s", told.watch.tenant, told.watch.name, told.watch.alias, reason
                )


class Shadows:
    """Copies of requests, answered by an alias's shadow. They are not charged beforehand, wait behind everything else of
    their tenant, and are not begun where anybody waits."""

    def __init__(
        self, catalog: Catalog, meter: Meter, outcomes: Outcomes, metrics: GatewayMetrics, timeout_s: float
    ) -> None:
        self._catalog, self._meter, self._outcomes = catalog, meter, outcomes
        self._metrics, self._timeout_s = metrics, timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers = 0  # being computed

    def send(self, target: Target, requests: Sequence[GenerateRequest], answered: Generation) -> None:
        """Copy a request whose answer has begun, if its target has a shadow. `requests`: as they were asked."""
        answers = sum(request.params.n for request in requests)
        if target.shadow is None or self._answers + answers > MAX_SHADOWS or len(self._tasks) >= MAX_COMPARISONS:
            return
        self._answers += answers
        task = asyncio.create_task(self._answer(target, requests, answered, answers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End those that run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(
        self, target: Target, requests: Sequence[GenerateRequest], answered: Generation, answers: int
    ) -> None:
        try:
            try:
                shadow = await self._catalog.shadow_of(target)
                assert shadow is not None  # `send` saw to it
                ours = await self._generate(shadow, requests)
            finally:
                self._answers -= answers
            theirs = await answered.texts()  # its client may take its time
            if ours is not None and theirs is not None:
                self._outcomes.compare(shadow, ours == theirs)
        except Exception as error:  # a task's top: nobody waits for it
            log.warning("a shadow of %s failed", target.served_as, exc_info=error)

    async def _generate(self, shadow: Target, requests: Sequence[GenerateRequest]) -> list[str] | None:
        """What the shadow says, if it comes to its end."""
        if (await shadow.engine.stats()).waiting:
            return None
        copies = [
            replace(
                request,
                request_id=f"{request.request_id}-shadow",
                adapter=shadow.adapter,
                speculation=shadow.speculation(request.speculation),
                stream=False,
                priority=SHADOW_PRIORITY,
                max_wait_s=SHADOW_MAX_WAIT_S,
            )
            for request in requests
        ]

        def settle(ending: Ending) -> None:
            model = f"{shadow.served_as} (shadow)"
            self._meter.count(copies[0].request_id, copies[0].tenant, model, ending.counts)
            self._outcomes.note(shadow, ending)

        generation = Generation(shadow, copies, self._timeout_s, self._metrics, settle)
        try:
            await generation.start()
            await generation.collect()
        except SlipstreamError:
            return None  # `settle` was told
        finally:
            await generation.aclose()
        return await generation.texts()
