"""The hook in Serve's proxy, around Serve's own middleware and an application that stamps ids too."""

from __future__ import annotations

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from deployments.proxy import middlewares
from slipstream.api.connection import Connection
from slipstream.metrics.gateway import GatewayMetrics


async def ask(offered: bytes | None, inner: ASGIApp) -> list[str]:
    app: ASGIApp = RequestIdMiddleware(inner)
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    headers = [] if offered is None else [(b"x-request-id", offered)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return (await client.get("/", headers=headers)).headers.get_list("x-request-id")


def application() -> ASGIApp:
    return Connection(PlainTextResponse("ok"), metrics=GatewayMetrics(), body_limit=lambda method, path: 1)


@pytest.mark.parametrize("inner", [application(), PlainTextResponse("Serve's own answer")])
async def test_every_response_has_one_id(inner: ASGIApp) -> None:
    assert await ask(b"mine-1", inner) == ["mine-1"]
    for offered in (None, b"", b"x" * 129, b"two words", b"\xff"):
        (given,) = await ask(offered, inner)
        assert len(given) > 8
        assert given.encode("latin-1") != offered
