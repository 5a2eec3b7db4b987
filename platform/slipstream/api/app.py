"""The HTTP application: routes, and what surrounds them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI

from adapter_registry.tenants import LEASE_S
from slipstream.api import (
    adapters,
    aliases,
    chat,
    cluster,
    completions,
    files,
    fine_tuning,
    imports,
    keys,
    models,
    ops,
    tenants,
    webhooks,
)
from slipstream.api.connection import Connection
from slipstream.api.errors import install_handlers
from slipstream.api.rollout import TELL_EVERY_S
from slipstream.api.runtime import Runtime, build_runtime
from slipstream.api.scrape import Scrapes
from slipstream.api.services import ApiServices
from slipstream.api.uploads import prepare_upload_dir, scratch_folder
from slipstream.importing.rounds import ImportRounds
from slipstream.loops import keep_doing
from slipstream.metrics.gateway import GatewayMetrics
from slipstream.protocol import BaseModelSpec, EngineClient
from slipstream.publishing import Sweeper
from slipstream.training.jobs import Rounds
from slipstream.webhooks import Courier

MEND_EVERY_S = 86_400.0
RENEW_EVERY_S = LEASE_S / 3
_DESCRIPTION = """Many tenants' Turbo LoRA adapters on one shared base model, behind OpenAI's API.

Every route under `/v1` needs `Authorization: Bearer <key>`. The admin key acts for a
tenant with `X-Slipstream-Tenant`."""


def create_app(services: ApiServices) -> FastAPI:
    """Build the application. It starts nothing and may be called anywhere, inside a Ray Serve replica for one."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        async with _background(services, runtime):
            yield

    def body_limit(method: str, path: str) -> int:
        if method == "POST" and path.rstrip("/").endswith("/v1/adapters"):
            return services.max_upload_bytes
        if method == "POST" and path.rstrip("/").endswith("/v1/files"):
            return services.max_file_bytes
        return services.max_body_bytes

    app = FastAPI(title="Slipstream", description=_DESCRIPTION, lifespan=lifespan, redoc_url=None)
    metrics = GatewayMetrics(services.clock)
    app.state.runtime = runtime = build_runtime(services, metrics)
    app.state.scrapes = Scrapes(runtime)
    install_handlers(app)
    app.add_middleware(Connection, metrics=metrics, body_limit=body_limit, tracing=services.tracing)
    for module in (
        chat,
        completions,
        models,
        adapters,
        aliases,
        imports,
        files,
        fine_tuning,
        keys,
        tenants,
        webhooks,
        cluster,
        ops,
    ):
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _background(services: ApiServices, runtime: Runtime) -> AsyncGenerator[None]:
    """What a gateway does beside its requests. At the end what is under way ends, last of all what tells of it."""
    prepare_upload_dir(services.upload_dir)
    async with AsyncExitStack() as stack:  # whose callbacks all run, the last one first, whatever one of them raises
        if services.tracing is not None:
            stack.push_async_callback(asyncio.to_thread, services.tracing.close)
        importing = import_rounds(services, runtime)
        courier = Courier(services.webhooks, services.webhook_private_hosts, note=runtime.metrics.delivered)
        closing = (runtime.meter.flush, runtime.outcomes.tell, runtime.shadows.close, courier.close, importing.close)
        for close in closing:
            stack.push_async_callback(close)
        sweeper = Sweeper(
            services.store, services.blobs, services.sweep_grace_s, max(1, round(MEND_EVERY_S / services.sweep_every_s))
        )
        loops = (
            ("sweeping blobs", sweeper.make, services.sweep_every_s),
            ("looking after training jobs", _rounds(services, runtime).make, services.jobs_every_s),
            ("looking after imports", importing.make, services.imports_every_s),
            ("delivering webhooks", courier.make, services.webhooks_every_s),
            ("counting outcomes", runtime.outcomes.tell, TELL_EVERY_S),
            ("renewing leases", runtime.meter.renew, RENEW_EVERY_S),
        )
        tasks: set[asyncio.Task[None]] = {asyncio.create_task(keep_doing(*loop)) for loop in loops}
        tasks.add(asyncio.create_task(runtime.meter.keep_counting()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def _rounds(services: ApiServices, runtime: Runtime) -> Rounds:
    async def base(model: str) -> BaseModelSpec:
        return (await runtime.catalog.base_for_training(model)).spec

    return Rounds(
        jobs=services.jobs,
        store=services.store,
        runner=services.job_runner,
        base=base,
        max_running=services.max_running_jobs,
        stale_s=services.job_stale_s,
    )


def import_rounds(services: ApiServices, runtime: Runtime) -> ImportRounds:
    """One gateway's part in what becomes of imports."""

    async def base(model: str | None) -> tuple[BaseModelSpec, EngineClient]:
        target = await runtime.catalog.base(model)
        return target.spec, target.engine

    return ImportRounds(
        imports=services.imports,
        store=services.store,
        blobs=services.blobs,
        sources=services.sources,
        base=base,
        scratch=lambda: scratch_folder(services.upload_dir),
        max_bytes=services.max_upload_bytes,
        ended=runtime.metrics.imported,
    )
