"""A collector that takes OTLP over HTTP, as OpenTelemetry's own does, and keeps what it was sent."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from support.processes import eventually


@dataclass(frozen=True, eq=False)
class SentSpan:
    """One span as it came in."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str  # empty = none
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    events: Mapping[str, Mapping[str, Any]]
    failed: bool


@dataclass
class Collector:
    """`url` is the base address; `bodies` are the raw requests, for tests that look for what must not be in them."""

    url: str = ""
    spans: list[SentSpan] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    status: int = 200

    def trace(self, trace_id: str) -> list[SentSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def wait_for(self, trace_id: str, *names: str) -> list[SentSpan]:
        """The trace, once it has spans of all these names."""
        assert eventually(lambda: set(names) <= {span.name for span in self.trace(trace_id)}), self.trace(trace_id)
        return self.trace(trace_id)

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        assert path == "/v1/traces", path
        raw = gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body
        self.bodies.append(raw)
        self.headers.append(headers)
        self.spans.extend(_spans(ExportTraceServiceRequest.FromString(raw)))


@contextmanager
def collecting() -> Iterator[Collector]:
    """While it listens."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if collector.status == 200:
                collector.take(self.path, dict(self.headers), body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(collector.status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        collector.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join(10)


def only(spans: Sequence[SentSpan], name: str) -> SentSpan:
    """The one span of this name."""
    (found,) = [span for span in spans if span.name == name]
    return found


def _spans(request: ExportTraceServiceRequest) -> Iterator[SentSpan]:
    for resource in request.resource_spans:
        service = str(_attributes(resource.resource.attributes)["service.name"])
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield SentSpan(
                    service=service,
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes=_attributes(span.attributes),
                    events={event.name: _attributes(event.attributes) for event in span.events},
                    failed=span.status.code == 2,
                )


def _attributes(pairs: Sequence[KeyValue] | Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return (
        [_value(each) for each in value.array_value.values]
        if kind == "array_value"
        else getattr(value, kind or "string_value")
    )
