"""A replica's part of a trace, and whose request its log lines are about."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opentelemetry.trace import Span, SpanKind

from slipstream.errors import ServerError
from slipstream.protocol import GenerateEvent, GenerateRequest, Origin
from slipstream.telemetry.exchange import CURRENT, Exchange
from slipstream.telemetry.propagation import carried, failed

if TYPE_CHECKING:
    from slipstream.telemetry.tracing import Tracing

log = logging.getLogger("deployments.engine_replica")


@dataclass(slots=True)
class Served:
    """One request on this replica."""

    request: GenerateRequest  # as the engine is to get it: its spans go beneath ours
    span: Span | None = None
    begun: bool = False

    def note(self, batch: Sequence[GenerateEvent]) -> None:
        """Events on their way out."""
        if not self.begun and batch:
            self.begun = True
            if self.span is not None:
                self.span.add_event("first token")

    def fail(self, error: Exception) -> None:
        """It ends with this."""
        if isinstance(error, ServerError):
            log.warning("request %s: %s: %s", self.request.request_id, type(error).__name__, error)
        if self.span is not None:
            failed(self.span, error)


@contextmanager
def served(tracing: Tracing | None, request: GenerateRequest, model: str) -> Iterator[Served]:
    """While this replica has a request: what is logged here says whose it is."""
    origin = request.origin
    if origin is None:
        yield Served(request)
        return
    digest = request.adapter.digest if request.adapter is not None else None
    exchange = Exchange(origin.request_id, request.tenant, model, digest, log_prompts=origin.log_prompts)
    if origin.traceparent is not None:
        exchange.trace_id = origin.traceparent.split("-")[1]
    before = CURRENT.get()
    CURRENT.set(exchange)
    try:
        if tracing is None or not origin.sampled:
            yield Served(request)
        else:
            with _drawn(tracing, request, origin, exchange) as task:
                yield task
    finally:
        if CURRENT.get() is exchange:  # a generator may be closed in another task than it ran in
            CURRENT.set(before)


@contextmanager
def _drawn(tracing: Tracing, request: GenerateRequest, origin: Origin, exchange: Exchange) -> Iterator[Served]:
    known = {
        "slipstream.request_id": origin.request_id,
        "slipstream.call_id": request.request_id,
        "slipstream.tenant": request.tenant,
        "gen_ai.request.model": exchange.model,
        "slipstream.adapter": exchange.adapter,
    }
    attributes = {name: value for name, value in known.items() if value is not None}
    span = tracing.beneath(origin, "replica", attributes, SpanKind.SERVER)
    try:
        yield Served(replace(request, origin=carried(origin, span)), span)
    except (GeneratorExit, asyncio.CancelledError):  # the other end has gone
        span.set_attribute("slipstream.cancelled", True)
        raise
    finally:
        span.end()
