"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from slipstream.api.connection import while_connected
from slipstream.api.errors import ClientGone, problem_of
from slipstream.api.generation import Generation

DONE = b"data: [DONE]\n\n"
Json = dict[str, Any]


def sse_event(data: Json) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


class EventStream(Response):
    """Sends chunks as they come; a client that goes away cancels the generation, in any ASGI server.

    Starlette's `StreamingResponse` notices that by `receive` or by a failing `send`, depending on what the server says
    of itself; this one always listens.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        batches: AsyncIterator[list[Json]],
        generation: Generation,
        request_id: str,
        headers: Mapping[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        # Without these, proxies collect the events and hand them over late.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._batches = batches
        self._generation = generation
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, or stop where the client left."""
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            return
        finally:
            await self._generation.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes]:
        try:
            async for chunks in self._batches:
                if chunks:
                    yield b"".join(map(sse_event, chunks))  # one step, one write
            yield DONE
        except Exception as error:  # the connection's top loop once the status is sent: the client must get a sentence
            yield sse_event(problem_of(error, self._request_id).body())
