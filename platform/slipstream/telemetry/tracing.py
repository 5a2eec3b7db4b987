"""OpenTelemetry in one process: which spans begin where, and that sending them never keeps a request waiting.

Everything that OpenTelemetry's own variables say (sampler, headers, certificates, limits, resource) is left to its SDK;
`TracingPlan` brings them to processes on other nodes, whose environment is another.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, get_current_span
from opentelemetry.util.types import AttributeValue

from slipstream.process_env import prepare_environment
from slipstream.protocol import Origin
from slipstream.telemetry.plan import TracingPlan
from slipstream.telemetry.propagation import W3C, context_of

log = logging.getLogger(__name__)

_LAST_SPANS_S = 2.0  # that a process which ends gives its last spans
Attributes = Mapping[str, AttributeValue]


class Tracing:
    """One process's spans. None stands for it where tracing is off."""

    def __init__(self, processor: SpanProcessor, attributes: Mapping[str, str]) -> None:
        """`attributes`: of the process. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` win over them."""
        found = Resource.create()
        named = not str(found.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service")
        own = {name: value for name, value in attributes.items() if not (named and name == SERVICE_NAME)}
        # The provider is ours alone: others in the process (Ray Serve has spans too) may have set a global one.
        self._provider = TracerProvider(resource=found.merge(Resource(own)), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("slipstream")

    def serve(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> Span:
        """The span of a request that has come in, beneath what the client's W3C headers name.

        Where Ray Serve's own tracing is on, its span is the parent: it is beneath the client's already."""
        around = None if get_current_span().get_span_context().is_valid else W3C.extract(headers, Context())
        return self._tracer.start_span(name, around, SpanKind.SERVER, attributes)

    def beneath(
        self,
        origin: Origin,
        name: str,
        attributes: Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
        start_s: float | None = None,
    ) -> Span:
        """A span beneath the one that `origin` names; `start_s` in seconds since 1970, None = now."""
        return self._tracer.start_span(
            name, context_of(origin), kind, attributes, start_time=None if start_s is None else nanoseconds(start_s)
        )

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        # The SDK's own deadline is far longer, and a replica that stops is waited for.
        closing = threading.Thread(target=self._provider.shutdown, name="otel-shutdown", daemon=True)
        closing.start()
        closing.join(_LAST_SPANS_S)


def start_tracing(plan: TracingPlan, component: str, instance: str) -> Tracing:
    """This process's spans, sent to the collector in batches by a thread of their own.

    `component`: gateway or engine. What the collector does not take in time is dropped: the queue is bounded.
    """
    if plan.protocol != "http/protobuf":
        log.warning("OTEL_EXPORTER_OTLP_PROTOCOL is %r; spans are sent as http/protobuf", plan.protocol)
    # A node's own variables win over those of the node that built the application.
    prepare_environment({}, {name: value.get_secret_value() for name, value in plan.variables.items()})
    exporter = OTLPSpanExporter(endpoint=f"{plan.endpoint.rstrip('/')}/v1/traces" if plan.endpoint else None)
    attributes = {SERVICE_NAME: f"slipstream-{component}", "service.instance.id": instance}
    return Tracing(BatchSpanProcessor(exporter), attributes)


def nanoseconds(seconds: float) -> int:
    """As OpenTelemetry counts."""
    return round(seconds * 1e9)
