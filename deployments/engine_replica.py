"""The Serve deployment around one engine: a thin shell that starts it, feeds it and says how it is."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from ray import serve

from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.redis_changes import RedisChanges
from deployments.adapter_router import routing_stats
from deployments.adapter_source import BlobAdapterSource, remove_abandoned
from deployments.batching import Coalescer, merge_events
from deployments.change_follower import KeepsAdapters, follow
from deployments.ranks import Ranks, own_address
from deployments.replica_plan import ReplicaPlan, engine_config
from deployments.scaling_policy import PRESSURE, REQUESTS, TOKENS, WAIT
from deployments.serving_spans import Served, served
from deployments.telemetry import begin_telemetry
from slipstream.base_models import prepare_base_model
from slipstream.cluster.rates import Rates
from slipstream.cluster.view import RankReport, ReplicaReport
from slipstream.engine.timeline import TimelineEnded
from slipstream.errors import EngineFailed, SlipstreamError
from slipstream.metrics.engine import EngineMetrics
from slipstream.metrics.pages import Page, Process
from slipstream.protocol import BaseModelSpec, EngineClient, GenerateEvent, GenerateRequest, work

log = logging.getLogger("ray.serve")
_GUARD_S = 0.25  # between two looks at the step loop
_RANK_TIMEOUT_S = 0.5  # for a rank to say that it is there
_LAST_WORDS_S = 0.25  # for what the engine has said to leave the process


class Engine(EngineClient, Protocol):
    """An engine that lives in this process."""

    async def start(self) -> None:
        """Load the model and begin to step."""
        ...

    async def close(self) -> None:
        """Stop stepping and let go of everything."""
        ...


@runtime_checkable
class HealthChecked(Protocol):
    """An engine that can tell that it is broken."""

    def check_health(self) -> None:
        """Raises `EngineFailed` when the step loop has died."""
        ...


@runtime_checkable
class Traceable(Protocol):
    """An engine that tells what became of each traced sequence."""

    def trace_to(self, on_end: TimelineEnded) -> None:
        """Before `start`."""
        ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as a stream's last message: Ray would log a raised one as a crash and wrap it beyond recognition."""

    error: SlipstreamError
    bug: bool = False  # of ours, on this request: another replica would do no better


class EngineReplica:
    """One engine behind a Serve handle. `deployments.engine_client.RayEngineClient` is its other end."""

    async def __init__(self, plan: ReplicaPlan) -> None:  # type: ignore[misc]  # Serve awaits it
        prepared = await asyncio.to_thread(prepare_base_model, plan.model.base_model, plan.home)
        await asyncio.to_thread(remove_abandoned, plan.adapter_cache)
        source = BlobAdapterSource(
            ObstoreBlobs.from_url(plan.blob_url), plan.adapter_cache, plan.model.adapter_cache_bytes
        )
        module, _, name = plan.engine.partition(":")
        self._plan = plan
        self._ranks = Ranks(plan) if plan.model.tensor_parallel_size > 1 else None
        more = {"lead": self._ranks.lead} if self._ranks is not None else {}
        self._metrics = EngineMetrics()
        make = getattr(import_module(module), name)
        self._engine: Engine = make(engine_config(plan, prepared.path), source, observer=self._metrics, **more)
        self._tracing = begin_telemetry(plan.telemetry, "engine", _own_name())
        if self._tracing is not None and isinstance(self._engine, Traceable):
            from slipstream.telemetry.engine_spans import EngineSpans  # noqa: PLC0415 - not where nobody wants it

            self._engine.trace_to(EngineSpans(self._tracing).draw)
        self._coalescer = Coalescer()
        self._arrivals, self._rates, self._since = 0, Rates(), time.monotonic()
        await self._start()
        self._guard = asyncio.create_task(self._stand_guard())
        self._follower: asyncio.Task[None] | None = None
        if plan.redis_url is not None and isinstance(self._engine, KeepsAdapters):
            feed = RedisChanges.from_url(plan.redis_url.get_secret_value())
            self._follower = asyncio.create_task(follow(feed, self._engine, source))

    async def _start(self) -> None:
        """Load the model, on all ranks; a rank that cannot is heard of at once, and not when the others give up on it."""
        starting = asyncio.ensure_future(self._engine.start())
        if self._ranks is None:
            await starting
            return
        ending = asyncio.ensure_future(self._ranks.first_end())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            ending.cancel()
            await starting
            return
        await ending
        raise EngineFailed("A rank of this tensor-parallel replica ended while the model was loaded.")

    async def _stand_guard(self) -> None:
        """End this process when the engine or a rank has: Serve replaces it within seconds, where failing health checks take
        three periods, and callers hear at once and go on elsewhere."""
        lives = asyncio.ensure_future(self._ranks.first_end()) if self._ranks is not None else None
        while not self._broken() and not (lives is not None and lives.done()):  # noqa: ASYNC110 - a thread sets no event
            await asyncio.sleep(_GUARD_S)
        log.error("replica of %s ends: its engine or one of its ranks has", self._plan.model_id)
        await asyncio.sleep(_LAST_WORDS_S)
        os._exit(1)

    def _broken(self) -> bool:
        try:
            self.check_health()
        except EngineFailed:
            return True
        return False

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[GenerateEvent] | Refusal]:
        """Stream a request's events. Serve closes this generator when the other end cancels."""
        self._arrivals += 1
        with served(self._tracing, request, self._plan.model_id) as task:
            batches = self._coalescer.batches(self._engine.generate(task.request))
            async with aclosing(batches) as stream:
                try:
                    async for batch in stream:
                        task.note(batch)
                        yield batch
                except Exception as error:  # the call's top loop: what is raised into Serve is logged with all it says
                    yield refusal(task, error)

    async def generate_all(self, request: GenerateRequest) -> list[GenerateEvent] | Refusal:
        """The whole answer in one message."""
        self._arrivals += 1
        with served(self._tracing, request, self._plan.model_id) as task:
            async with aclosing(self._engine.generate(task.request)) as stream:
                try:
                    events = []
                    async for step in stream:
                        events.extend(step)
                    return merge_events(events)
                except Exception as error:  # as above
                    return refusal(task, error)

    async def describe(self) -> BaseModelSpec:
        """The base model behind this engine."""
        return await self._engine.describe()

    async def report(self) -> ReplicaReport:
        """What this replica is and does."""
        own = RankReport(0, own_address(), os.getpid())
        others = await self._ranks.reports() if self._ranks is not None else ()
        return ReplicaReport(_own_name(), (own, *others), time.monotonic() - self._since, await self._engine.stats())

    async def metrics(self) -> Page:
        """What this replica counts, for the gateway that is scraped."""
        size = self._plan.model.tensor_parallel_size
        up = 1 if self._ranks is None else 1 + await self._ranks.answering(_RANK_TIMEOUT_S)
        process = Process(_own_name(), self._plan.model_id)
        return self._metrics.page(process, await self._engine.stats(), size, up)

    async def record_routing_stats(self) -> dict[str, Any]:
        """For `AdapterRouter`; Serve asks every second or so."""
        return routing_stats(await self._engine.stats())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `RequestRatePolicy`; Serve asks every second or so."""
        stats = await self._engine.stats()
        requests, tokens = self._rates.per_s(time.monotonic(), self._arrivals, stats.work_tokens)
        # A full replica works as fast as it can, whatever is asked of it: arrivals tell, at what requests cost so far.
        mean = work(stats.prompt_tokens, stats.completion_tokens) / max(1, stats.finished)
        used = stats.adapter_slots - stats.slots_free + stats.adapters_wanted
        return {
            REQUESTS: requests,
            TOKENS: max(tokens, requests * mean),
            WAIT: stats.queue_wait_s,
            PRESSURE: used / stats.adapter_slots if stats.adapter_slots else 0.0,
        }

    def check_health(self) -> None:
        """Serve replaces the replica when this keeps raising."""
        if isinstance(self._engine, HealthChecked):
            self._engine.check_health()

    async def __del__(self) -> None:
        for task in (getattr(self, "_guard", None), getattr(self, "_follower", None)):
            if task is not None:
                task.cancel()
        engine, tracing = getattr(self, "_engine", None), getattr(self, "_tracing", None)
        try:
            if engine is not None:
                await engine.close()
        finally:
            if tracing is not None:
                await asyncio.to_thread(tracing.close)


def _own_name() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def refusal(task: Served, error: Exception) -> Refusal:
    """What the other end is told of it."""
    task.fail(error)
    if isinstance(error, SlipstreamError):
        return Refusal(error)
    log.error("the engine failed on a request", exc_info=error)
    return Refusal(EngineFailed("The engine failed on this request."), bug=True)
