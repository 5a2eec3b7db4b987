"""A replica's span, and what its log lines know, without a replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from opentelemetry.trace import StatusCode
from support.log_lines import kept_lines
from support.spans import HEADER, PARENT_ID, TRACE_ID, UNSAMPLED, KeptSpans, id_of, parent_of

from deployments.serving_spans import log, served
from slipstream.errors import AdapterUnavailable, InvalidRequest
from slipstream.protocol import AdapterRef, GenerateEvent, GenerateRequest, Origin, SamplingParams


def request(header: str | None = HEADER) -> GenerateRequest:
    origin = Origin("req-1", header)
    return GenerateRequest(
        "call-1", "acme", SamplingParams(), "hi", adapter=AdapterRef("acme", "sha256:a"), origin=origin
    )


def test_the_engine_gets_the_request_beneath_the_replicas_span() -> None:
    kept = KeptSpans()
    with served(kept.tracing, request(), "base") as task:
        task.note([GenerateEvent(0, "a", (1,))])
        task.note([GenerateEvent(0, "b", (2,))])
    span = kept.only("replica")
    assert parent_of(span) == PARENT_ID
    assert task.request.origin == Origin("req-1", f"00-{TRACE_ID}-{id_of(span)}-01")
    wanted = {"slipstream.request_id": "req-1", "slipstream.tenant": "acme", "slipstream.adapter": "sha256:a"}
    assert {name: (span.attributes or {}).get(name) for name in wanted} == wanted
    assert [event.name for event in span.events] == ["first token"]


@pytest.mark.parametrize(("error", "status"), [(AdapterUnavailable("no"), "ERROR"), (InvalidRequest("no"), "UNSET")])
def test_how_it_ends_is_told(error: AdapterUnavailable | InvalidRequest, status: str) -> None:
    kept = KeptSpans()
    with kept_lines(log.name) as lines, served(kept.tracing, request(), "base") as task:
        task.fail(error)
    span = kept.only("replica")
    assert span.status.status_code is StatusCode[status]
    assert (span.attributes or {})["error.type"] == type(error).__name__
    assert [record.__dict__["request_id"] for record in lines.records] == (["req-1"] if status == "ERROR" else [])


@pytest.mark.parametrize("header", [None, UNSAMPLED])
async def test_what_nobody_samples_is_passed_on_and_still_in_the_lines(header: str | None) -> None:
    kept = KeptSpans()
    asked = request(header)

    async def answered() -> GenerateRequest:
        with served(kept.tracing, asked, "base") as task:
            log.warning("said")
            return task.request

    with kept_lines(log.name) as lines:
        assert await asyncio.create_task(answered()) is asked
        log.warning("outside")
    assert not kept.spans
    inside, outside = lines.records
    assert (inside.__dict__["tenant"], inside.__dict__["adapter"]) == ("acme", "sha256:a")
    assert inside.__dict__.get("trace_id") == (TRACE_ID if header else None)
    assert "tenant" not in outside.__dict__


async def test_a_call_that_is_closed_is_told_as_that() -> None:
    kept = KeptSpans()

    async def events() -> AsyncGenerator[int]:
        with served(kept.tracing, request(), "base"):
            yield 1
            yield 2

    stream = events()
    await anext(stream)
    await stream.aclose()
    assert (kept.only("replica").attributes or {})["slipstream.cancelled"] is True
