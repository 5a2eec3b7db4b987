"""What Serve's HTTP proxy runs around every request: one request id, the same inside and out.

Serve adds an `x-request-id` of its own to each response, whatever the application has sent, and echoes what a client
offered, sane or not. It names this hook in `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` (`local_ray.py`, `k8s/`).
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.api.connection import is_sane_id

_HEADER = "x-request-id"


class OneRequestId:
    """Around Serve's own middleware: an insane id never reaches it, and its second header does not leave."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                ids = Headers(raw=list(message.get("headers", ()))).getlist(_HEADER)
                if ids:
                    MutableHeaders(scope=message)[_HEADER] = ids[0]  # setting it takes the others away
            await send(message)

        if scope["type"] == "http" and not all(map(is_sane_id, Headers(scope=scope).getlist(_HEADER))):
            del MutableHeaders(scope=scope)[_HEADER]
        await self._app(scope, receive, send_one)


def middlewares() -> list[Middleware]:
    """What Serve asks for; they go around its own."""
    return [Middleware(OneRequestId)]
