"""/healthz, /readyz and /metrics: for machines that watch. None of them needs a key."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from adapter_registry.keys import hash_key
from slipstream.api.errors import KNOWN_ERRORS
from slipstream.api.runtime import RuntimeDep
from slipstream.api.services import ApiServices
from slipstream.api.sse import Json
from slipstream.errors import Unauthorized

router = APIRouter(tags=["Operations"])
log = logging.getLogger("slipstream.api")


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
async def metrics(
    request: Request, runtime: RuntimeDep, authorization: Annotated[str | None, Header()] = None
) -> Response:
    """Prometheus text, for all gateways and engine replicas, whichever gateway is asked. What names tenants and adapters
    is there for the metrics key and the admin key only; 401 for any other."""
    if authorization is not None:
        _check_key(authorization, runtime.services)
    page: bytes = await request.app.state.scrapes.page(names=authorization is not None)
    return Response(page, media_type=CONTENT_TYPE_LATEST)


def _check_key(authorization: str, services: ApiServices) -> None:
    scheme, _, key = authorization.partition(" ")
    sent = hash_key(key.strip())
    known = [each for each in (services.admin_key_sha256, services.metrics_key_sha256) if each is not None]
    if scheme.lower() != "bearer" or not any(hmac.compare_digest(sent, each) for each in known):
        raise Unauthorized("This key does not open the metrics. Send the metrics key or the admin key, or none.")


async def _answers(part: Awaitable[object], timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(part, timeout_s)
    except (TimeoutError, *KNOWN_ERRORS) as error:
        log.info("not ready: %s", error)
        return False
    return True
