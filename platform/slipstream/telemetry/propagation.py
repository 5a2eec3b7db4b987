"""How a trace goes from one process to the next, as W3C's `traceparent` and `tracestate` inside an `Origin`."""

from __future__ import annotations

from dataclasses import replace

from opentelemetry.context import Context
from opentelemetry.trace import Span, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from slipstream.errors import ClientError
from slipstream.protocol import Origin

W3C = TraceContextTextMapPropagator()


def context_of(origin: Origin) -> Context:
    """OpenTelemetry's form of it."""
    headers = {"traceparent": origin.traceparent, "tracestate": origin.tracestate}
    return W3C.extract({name: value for name, value in headers.items() if value}, Context())


def carried(origin: Origin, span: Span) -> Origin:
    """`origin` for whoever draws spans beneath `span`, here or elsewhere."""
    own = span.get_span_context()
    parent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"
    return replace(origin, traceparent=parent, tracestate=own.trace_state.to_header() or None)


def failed(span: Span, error: BaseException) -> None:
    """Mark a span: what kind of error, and not what it says, which may quote a request. What a client did wrong is an
    attribute; only what is ours to mend is an error."""
    span.set_attribute("error.type", type(error).__name__)
    if not isinstance(error, ClientError):
        span.set_status(StatusCode.ERROR)
