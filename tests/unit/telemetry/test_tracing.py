"""Where spans begin and go, and what a plan says of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from pydantic import SecretStr
from support.otlp import Collector, collecting
from support.processes import free_port
from support.spans import HEADER, PARENT_ID, TRACE_ID, UNSAMPLED, KeptSpans, id_of, parent_of, trace_of

from slipstream.errors import EngineFailed, InvalidRequest
from slipstream.protocol import Origin
from slipstream.telemetry.plan import TracingPlan
from slipstream.telemetry.propagation import carried, failed
from slipstream.telemetry.tracing import start_tracing


def plan(endpoint: str | None = None, **variables: str) -> TracingPlan:
    return TracingPlan(endpoint, {name: SecretStr(value) for name, value in variables.items()})


@pytest.mark.parametrize(
    ("wanted", "on"),
    [
        (plan(), False),
        (plan("http://x:4318"), True),
        (plan(OTEL_EXPORTER_OTLP_ENDPOINT="http://x:4318"), True),
        (plan(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://x:4318/v1/traces"), True),
        (plan(OTEL_EXPORTER_OTLP_METRICS_ENDPOINT="http://x:4318/v1/metrics"), False),
        (plan("http://x:4318", OTEL_SDK_DISABLED="true"), False),
        (plan("http://x:4318", OTEL_TRACES_EXPORTER="none"), False),
    ],
)
def test_tracing_is_on_where_a_collector_is_named(wanted: TracingPlan, on: bool) -> None:
    assert wanted.on is on


def test_a_plan_shows_no_keys() -> None:
    assert "hunter2" not in repr(plan("http://x", OTEL_EXPORTER_OTLP_HEADERS="api-key=hunter2"))


def test_a_trace_goes_on_from_the_client_to_the_last_process() -> None:
    kept = KeptSpans()
    server = kept.tracing.serve("POST", {"traceparent": HEADER, "tracestate": "vendor=7"}, {})
    origin = carried(Origin("r"), server)
    inner = kept.tracing.beneath(origin, "inner", {"a": 1}, start_s=12.5)
    inner.end(13_000_000_000)
    server.end()
    outer, within = kept.only("POST"), kept.only("inner")
    assert (trace_of(outer), parent_of(outer)) == (TRACE_ID, PARENT_ID)
    assert (trace_of(within), parent_of(within)) == (TRACE_ID, id_of(outer))
    assert (within.start_time, within.end_time) == (12_500_000_000, 13_000_000_000)
    assert origin.tracestate == "vendor=7"
    assert origin.sampled


def test_what_the_client_has_not_sampled_is_carried_and_not_kept() -> None:
    kept = KeptSpans()
    server = kept.tracing.serve("POST", {"traceparent": UNSAMPLED}, {})
    origin = carried(Origin("r"), server)
    kept.tracing.beneath(origin, "inner", {}).end()
    server.end()
    assert not kept.spans
    assert not origin.sampled
    assert origin.traceparent is not None
    assert TRACE_ID in origin.traceparent, "log lines still know it"


@pytest.mark.parametrize("header", ["", "garbage", f"00-{TRACE_ID}-{'0' * 16}-01", "00-" + "g" * 32 + "-1-01"])
def test_a_header_that_is_none_begins_a_trace_of_its_own(header: str) -> None:
    kept = KeptSpans()
    kept.tracing.serve("GET", {"traceparent": header}, {}).end()
    assert kept.only("GET").parent is None


def test_a_span_of_serves_own_tracing_is_the_parent() -> None:
    kept = KeptSpans()
    with TracerProvider().get_tracer("serve").start_as_current_span("proxy") as around:
        kept.tracing.serve("GET", {"traceparent": HEADER}, {}).end()
    assert parent_of(kept.only("GET")) == f"{around.get_span_context().span_id:016x}"


def test_an_error_is_named_and_not_quoted() -> None:
    kept = KeptSpans()
    for name, error in (("ours", EngineFailed("secret")), ("theirs", InvalidRequest("secret"))):
        span = kept.tracing.serve(name, {}, {})
        failed(span, error)
        span.end()
    ours, theirs = kept.only("ours"), kept.only("theirs")
    assert (ours.attributes or {})["error.type"] == "EngineFailed"
    assert ours.status.status_code is trace.StatusCode.ERROR
    assert theirs.status.status_code is trace.StatusCode.UNSET
    assert "secret" not in ours.to_json() + theirs.to_json()


CHILD = """
import sys
from pydantic import SecretStr
from slipstream.telemetry.plan import TracingPlan
from slipstream.telemetry.tracing import start_tracing
variables = dict(pair.split("=", 1) for pair in sys.argv[2:])
tracing = start_tracing(TracingPlan(sys.argv[1] or None, {k: SecretStr(v) for k, v in variables.items()}), "engine", "r1")
for i in range(5000):
    tracing.serve(f"span {i}", {}, {"i": i}).end()
tracing.close()
print("over")
"""


def child(endpoint: str, *variables: str) -> None:
    """A process that was told of a collector by its plan alone, ends 5000 spans, and stops."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, endpoint, *variables],
        env=kept, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "over\n", done.stderr


def test_a_process_elsewhere_is_set_up_by_what_its_plan_brings() -> None:
    with collecting() as collector:
        more = ("OTEL_SERVICE_NAME=mine", "OTEL_EXPORTER_OTLP_HEADERS=api-key=secret", "OTEL_BSP_MAX_QUEUE_SIZE=10000")
        child(collector.url + "/", *more)
        assert len(collector.spans) == 5000, "what is left goes out with the process"
        assert {span.service for span in collector.spans} == {"mine"}
        assert {headers["api-key"] for headers in collector.headers} == {"secret"}


@pytest.mark.parametrize("answers", [True, False])
def test_a_collector_that_takes_nothing_keeps_nobody_waiting(answers: bool) -> None:
    """It is away, or answers 503 for ever: spans are dropped, and the process ends."""
    with collecting() as collector:
        collector.status = 503
        child(collector.url if answers else f"http://127.0.0.1:{free_port()}")
    assert not collector.spans


def test_without_a_name_of_its_own_a_service_is_named_for_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    with collecting() as collector:
        _one_span(collector)
        assert {span.service for span in collector.spans} == {"slipstream-gateway"}


def _one_span(collector: Collector) -> None:
    tracing = start_tracing(plan(collector.url), "gateway", "g1")
    tracing.serve("GET", {}, {}).end()
    tracing.close()
