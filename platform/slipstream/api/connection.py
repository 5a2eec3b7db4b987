"""The life of a connection: its id, its body cap, its metrics, its last resort; and noticing that the client is gone.

Pure ASGI: Starlette's `BaseHTTPMiddleware` puts a queue between handler and client, which hides disconnects.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.api.errors import CLIENT_CLOSED_REQUEST, ClientGone, problem_of
from slipstream.api.observing import UNMATCHED, Observed
from slipstream.errors import PayloadTooLarge
from slipstream.metrics.gateway import GatewayMetrics

if TYPE_CHECKING:
    from slipstream.telemetry.tracing import Tracing

log = logging.getLogger("slipstream.api")
T = TypeVar("T")
_SANE_ID = re.compile(r"[!-~]{1,128}")


class AnswerCut(Exception):
    """An answer broke off after its status was sent; why is in the log."""


def is_sane_id(offered: str) -> bool:
    """Whether a client's request id is fit for headers and logs."""
    return _SANE_ID.fullmatch(offered) is not None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, cancelled as soon as the client goes away (then `ClientGone`, when it has let go of its engine). The body
    has been read already. As `asyncio.timeout` does it: in the caller's own task, which costs a task less."""
    task = asyncio.current_task()
    assert task is not None
    cancelled_before, gone, over = task.cancelling(), False, False

    def leave(ended: asyncio.Task[None]) -> None:
        nonlocal gone
        if not ended.cancelled():
            ended.exception()  # a connection that cannot be read is over as well
            if not over:
                gone = True
                task.cancel()

    watching = asyncio.ensure_future(_disconnected(receive))
    watching.add_done_callback(leave)
    try:
        result = await work
    except (Exception, asyncio.CancelledError) as error:
        # Whatever work said when it was cancelled; unless somebody else has cancelled it as well.
        if gone and (task.uncancel() <= cancelled_before or not isinstance(error, asyncio.CancelledError)):
            raise ClientGone from None
        raise
    finally:
        over = True  # the watcher may have ended just now: its callback is then still to come
        watching.cancel()
    if gone:  # work would not be stopped
        task.uncancel()
    return result


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Connection:
    """Outermost layer: every response leaves through it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: GatewayMetrics,
        body_limit: Callable[[str, str], int],
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._body_limit = body_limit
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(self._app, scope, receive, send).run(self._metrics, self._body_limit, self._tracing)


class _Exchange:
    """One request and its response."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._scope, self._receive, self._send = app, scope, receive, send
        self._headers = Headers(scope=scope)
        offered = self._headers.get("x-request-id", "")
        self._id = offered if is_sane_id(offered) else f"req-{secrets.token_hex(12)}"
        self._status: int | None = None
        self._received = 0
        self._limit = 0

    async def run(
        self, metrics: GatewayMetrics, body_limit: Callable[[str, str], int], tracing: Tracing | None
    ) -> None:
        observed = Observed(self._scope, self._headers, self._id, tracing)
        self._scope.setdefault("state", {})["request_id"] = self._id
        self._limit = body_limit(self._scope["method"], self._scope["path"])
        try:
            await self._guarded()
        finally:
            route = getattr(self._scope.get("route"), "path", "") or UNMATCHED
            status = self._status or CLIENT_CLOSED_REQUEST
            metrics.answered(route, self._scope["method"], status, observed.end(route, status))

    async def _guarded(self) -> None:
        try:
            if self._announced() > self._limit:
                raise self._too_large()  # at once, without reading: the client may have gigabytes to send
            await self._app(self._scope, self._count_in, self._stamp_out)
        except Exception as error:  # the connection's top loop: whatever got here must not leak
            if self._status is not None:
                # Too late for a status: the server cuts the connection, so nobody takes the rest for an answer. It logs what
                # it is raised, and what this says may quote the request.
                log.error("request %s: the answer was cut", self._id, exc_info=error)
                raise AnswerCut from None
            await problem_of(error, self._id).response()(self._scope, self._receive, self._stamp_out)

    def _announced(self) -> int:
        length = self._headers.get("content-length", "")
        return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body is larger than the {self._limit} bytes that are taken here.")

    async def _count_in(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            raise self._too_large()
        return message

    async def _stamp_out(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._id
        elif self._scope["method"] == "HEAD":  # servers do this too, but not all of them
            message = {**message, "body": b""}
        await self._send(message)
