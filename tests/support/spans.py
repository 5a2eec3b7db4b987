"""Spans kept in memory, by OpenTelemetry's own exporter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from slipstream.telemetry.tracing import Tracing

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
HEADER = f"00-{TRACE_ID}-{PARENT_ID}-01"
UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"


@dataclass
class KeptSpans:
    """A process's tracing, and what it has drawn so far."""

    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    tracing: Tracing = field(init=False)

    def __post_init__(self) -> None:
        self.tracing = Tracing(SimpleSpanProcessor(self.exporter), {"service.name": "slipstream-test"})

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def only(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]


def parent_of(span: ReadableSpan) -> str:
    """The parent's id in hex; empty = none."""
    return f"{span.parent.span_id:016x}" if span.parent is not None else ""


def id_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.span_id:016x}"


def trace_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}"
