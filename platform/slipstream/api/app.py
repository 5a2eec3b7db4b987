"""The HTTP application: routes, and what surrounds them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from slipstream.api import adapters, chat, completions, keys, models, ops
from slipstream.api.connection import Connection
from slipstream.api.errors import install_handlers
from slipstream.api.metrics import HttpMetrics
from slipstream.api.runtime import build_runtime
from slipstream.api.services import ApiServices
from slipstream.api.uploads import prepare_upload_dir
from slipstream.publishing import keep_sweeping

_DESCRIPTION = """Many tenants' Turbo LoRA adapters on one shared base model, behind OpenAI's API.

Every route under `/v1` needs `Authorization: Bearer <key>`. The admin key acts for a
tenant with `X-Slipstream-Tenant`."""


def create_app(services: ApiServices) -> FastAPI:
    """Build the application. It starts nothing and may be called anywhere, inside a Ray Serve replica for one."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        prepare_upload_dir(services.upload_dir)
        sweeping = asyncio.create_task(
            keep_sweeping(
                services.store, services.blobs, every_s=services.sweep_every_s, older_than_s=services.sweep_grace_s
            )
        )
        try:
            yield
        finally:
            sweeping.cancel()
            await asyncio.wait({sweeping})

    def body_limit(method: str, path: str) -> int:
        is_upload = method == "POST" and path.rstrip("/").endswith("/v1/adapters")
        return services.max_upload_bytes if is_upload else services.max_body_bytes

    app = FastAPI(title="Slipstream", description=_DESCRIPTION, lifespan=lifespan, redoc_url=None)
    http_metrics = HttpMetrics()
    app.state.runtime = build_runtime(services, http_metrics)
    install_handlers(app)
    app.add_middleware(Connection, metrics=http_metrics, body_limit=body_limit)
    for module in (chat, completions, models, adapters, keys, ops):
        app.include_router(module.router)
    return app
