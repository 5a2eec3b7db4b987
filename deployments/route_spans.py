"""The router's part of a trace: one span for each replica that a request is sent to, with why it was chosen.

It is the client's end of the call, so it lasts until the replica has answered; the choice itself is an event in it. Serve
builds routers by itself and runs them in a thread of their own: what a router knows of a try meets its span here, by the
`traceparent` that the request carries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from opentelemetry.trace import Span, SpanKind

from slipstream.protocol import GenerateRequest
from slipstream.telemetry.propagation import carried, failed

if TYPE_CHECKING:
    from slipstream.telemetry.tracing import Tracing

_WAITING: dict[str, Span] = {}  # traceparent → the span of a try that no replica has taken yet


@contextmanager
def one_try(
    tracing: Tracing | None, request: GenerateRequest, deployment: str, number: int, why: str | None
) -> Iterator[GenerateRequest]:
    """The request as the replica is to get it, while it is tried there. `why`: what ended the try before, if any did."""
    if tracing is None or request.origin is None or request.origin.traceparent is None:
        yield request
        return
    attributes: dict[str, str | int] = {
        "slipstream.deployment": deployment,
        "slipstream.try": number,
        "slipstream.call_id": request.request_id,
    }
    if why is not None:
        attributes["slipstream.retry.reason"] = why
    if request.adapter is not None:
        attributes["slipstream.adapter"] = request.adapter.digest
    span = tracing.beneath(request.origin, "route", attributes, SpanKind.CLIENT)
    origin = carried(request.origin, span)
    assert origin.traceparent is not None
    if origin.sampled:
        _WAITING[origin.traceparent] = span
    try:
        yield replace(request, origin=origin)
    except (GeneratorExit, asyncio.CancelledError):  # its client has gone
        span.set_attribute("slipstream.cancelled", True)
        raise
    except BaseException as error:
        failed(span, error)
        raise
    finally:
        _WAITING.pop(origin.traceparent, None)
        span.end()


def waiting_span(request: GenerateRequest) -> Span | None:
    """The span of the try that this request is, for the router."""
    if not _WAITING or request.origin is None or request.origin.traceparent is None:
        return None
    return _WAITING.get(request.origin.traceparent)
