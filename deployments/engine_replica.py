"""The Serve deployment around one engine: a thin shell that starts it, feeds it and says how it is."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from adapter_registry.blobs import ObstoreBlobs
from deployments.adapter_source import BlobAdapterSource, remove_abandoned
from deployments.batching import Coalescer, merge_events
from slipstream.base_models import prepare_base_model
from slipstream.config import ModelSettings
from slipstream.engine.config import EngineConfig
from slipstream.errors import SlipstreamError
from slipstream.protocol import BaseModelSpec, EngineClient, EngineStats, GenerateEvent, GenerateRequest

REAL_ENGINE = "slipstream.engine.service:EngineService"
_ENGINE_FIELDS = (
    "dtype",
    "quantize",
    "device",
    "max_batched_tokens",
    "long_prompt_stretch",
    "max_num_seqs",
    "max_waiting",
    "kv_cache_bytes",
    "block_size",
    "max_model_len",
    "prefix_caching",
    "max_draft",
    "disable",
    "adapter_slots",
    "host_adapter_bytes",
    "adapter_fetch_timeout_s",
)


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


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What a replica is built from: plain data, so that it travels to any node."""

    model: ModelSettings
    model_id: str
    home: Path
    blob_url: str
    engine: str = REAL_ENGINE  # "module:callable" taking (EngineConfig, AdapterSource); tests put a fake here

    @property
    def adapter_cache(self) -> Path:
        """Where fetched adapters are kept."""
        return self.home / "cache" / "adapters"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as a stream's last message: Ray would log a raised one as a crash and wrap it beyond recognition."""

    error: SlipstreamError


class EngineReplica:
    """One engine behind a Serve handle. `deployments.engine_client.RayEngineClient` is its other end."""

    async def __init__(self, plan: ReplicaPlan) -> None:  # type: ignore[misc]  # Serve awaits it
        prepared = await asyncio.to_thread(prepare_base_model, plan.model.base_model, plan.home)
        await asyncio.to_thread(remove_abandoned, plan.adapter_cache)
        source = BlobAdapterSource(
            ObstoreBlobs.from_url(plan.blob_url), plan.adapter_cache, plan.model.adapter_cache_bytes
        )
        module, _, name = plan.engine.partition(":")
        self._engine: Engine = getattr(import_module(module), name)(engine_config(plan, prepared.path), source)
        self._coalescer = Coalescer()
        await self._engine.start()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[GenerateEvent] | Refusal]:
        """Stream a request's events. Serve closes this generator when the other end cancels."""
        batches = self._coalescer.batches(self._engine.generate(request))
        async with aclosing(batches) as stream:
            try:
                async for batch in stream:
                    yield batch
            except SlipstreamError as error:
                yield Refusal(error)

    async def generate_all(self, request: GenerateRequest) -> list[GenerateEvent] | Refusal:
        """The whole answer in one message."""
        async with aclosing(self._engine.generate(request)) as stream:
            try:
                return merge_events([event async for step in stream for event in step])
            except SlipstreamError as error:
                return Refusal(error)

    async def describe(self) -> BaseModelSpec:
        """The base model behind this engine."""
        return await self._engine.describe()

    async def stats(self) -> EngineStats:
        """A snapshot of the engine's counters."""
        return await self._engine.stats()

    def check_health(self) -> None:
        """Serve replaces the replica when this keeps raising."""
        if isinstance(self._engine, HealthChecked):
            self._engine.check_health()

    async def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.close()


def engine_config(plan: ReplicaPlan, path: Path) -> EngineConfig:
    """The engine's part of a model's settings. Threads are explicit: Ray sets OMP_NUM_THREADS to the reserved CPUs."""
    model = plan.model
    shared: dict[str, Any] = {name: getattr(model, name) for name in _ENGINE_FIELDS}
    threads = model.engine_threads or len(os.sched_getaffinity(0))
    return EngineConfig(
        model_path=str(path),
        model_id=plan.model_id,
        num_threads=threads,
        scratch_dir=str(plan.adapter_cache),  # one file system with the cache: adapters are hard-linked
        **shared,
    )


def on_its_cores(model: ModelSettings) -> ModelSettings:
    """As many threads as cores that Ray sets aside: a node of a cluster is shared."""
    return model.model_copy(update={"engine_threads": model.engine_threads or max(1, math.ceil(model.engine_cpus))})
