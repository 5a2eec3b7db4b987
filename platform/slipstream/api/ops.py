"""/healthz, /readyz and /metrics: for machines that watch, without a key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from slipstream.api.errors import KNOWN_ERRORS
from slipstream.api.runtime import RuntimeDep
from slipstream.api.sse import Json

router = APIRouter(tags=["Operations"])
log = logging.getLogger("slipstream.api")
T = TypeVar("T")


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Json:
    """The process answers."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(runtime: RuntimeDep) -> Response:
    """The registry and every engine answer; else 503 with the ones that do not. A model that has scaled to zero is ready."""
    services = runtime.services
    parts: dict[str, Awaitable[object]] = {
        "registry": services.store.ping(),
        # Not `describe`: a dead step loop still describes its model, and a model that sleeps would be woken.
        **{base: engine.stats() for base, engine in services.engines.items()},
    }
    answers = await asyncio.gather(*(_answers(part, services.probe_timeout_s) for part in parts.values()))
    missing = [name for name, answer in zip(parts, answers, strict=True) if not answer]
    body = {"status": "not_ready", "missing": missing} if missing else {"status": "ready", "missing": []}
    return JSONResponse(body, 503 if missing else 200)


@router.get("/metrics")
async def metrics(runtime: RuntimeDep) -> Response:
    """Prometheus text."""
    services = runtime.services
    engines = services.engines
    snapshots = await asyncio.gather(*(_probe(engine.stats(), services.probe_timeout_s) for engine in engines.values()))
    page = runtime.metrics.render(dict(zip(engines, snapshots, strict=True)))
    return Response(page, media_type=CONTENT_TYPE_LATEST)


async def _answers(part: Awaitable[object], timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(part, timeout_s)
    except (TimeoutError, *KNOWN_ERRORS) as error:
        log.info("not ready: %s", error)
        return False
    return True


async def _probe(part: Awaitable[T], timeout_s: float) -> T | None:
    try:
        return await asyncio.wait_for(part, timeout_s)
    except (TimeoutError, *KNOWN_ERRORS):
        return None
