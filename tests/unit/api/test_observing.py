"""The server span and the log lines of requests, over fakes: what they say, and that they hold no prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from support.api_app import ADMIN_KEY, BASE, ApiWorld
from support.log_lines import KeptLines, kept_lines
from support.spans import HEADER, PARENT_ID, TRACE_ID, UNSAMPLED, KeptSpans, id_of, parent_of, trace_of

from slipstream.api.connection import AnswerCut
from slipstream.errors import EngineFailed
from slipstream.testing import FakeAnswer

CANARY = "a canary sings"  # never spelt out where it is raised: tracebacks show source lines
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": BASE, "messages": [{"role": "user", "content": CANARY}], "max_tokens": 8}
SAMPLED = {"traceparent": HEADER, "tracestate": "vendor=7"}


@pytest.fixture
def kept(world: ApiWorld) -> KeptSpans:
    """The application draws spans; clients of it come after."""
    found = KeptSpans()
    world.rebuild(tracing=found.tracing)
    return found


@pytest.fixture
def lines() -> Iterator[KeptLines]:
    with kept_lines("slipstream") as found:
        yield found


def access(lines: KeptLines) -> list[dict[str, Any]]:
    found = [line.__dict__ for line in lines.records if line.name == "slipstream.access"]
    return [line for line in found if "route" in line]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
async def test_the_server_span(world: ApiWorld, kept: KeptSpans, http: httpx.AsyncClient, stream: bool) -> None:
    version = await world.publish("sql")
    world.engine.enqueue("one two three four")
    headers = {**SAMPLED, "x-request-id": "mine"}
    async with world.client(None, **headers) as client:
        client.headers["authorization"] = http.headers["authorization"]
        await client.post(CHAT, json={**ASKED, "model": "sql", "stream": stream})
    span = kept.only(f"POST {CHAT}")
    assert (trace_of(span), parent_of(span)) == (TRACE_ID, PARENT_ID)
    wanted = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "slipstream.request_id": "mine",
        "slipstream.tenant": "demo",
        "slipstream.adapter": version.digest,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "sql",
        "gen_ai.response.model": "sql@1",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "slipstream.decode_steps": 3,
        "slipstream.accepted_tokens": 1,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert {name: attributes(span).get(name) for name in wanted} == wanted
    assert [event.name for event in span.events] == (["first token"] if stream else [])
    assert span.status.status_code is StatusCode.UNSET
    (asked,) = world.engine.requests
    assert asked.origin is not None
    assert asked.origin.traceparent == f"00-{TRACE_ID}-{id_of(span)}-01", "whoever gets it goes on from here"
    assert (asked.origin.request_id, asked.origin.tracestate) == ("mine", "vendor=7")


async def test_who_watches_is_not_traced(world: ApiWorld, kept: KeptSpans, http: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        await http.get(path)
    assert not kept.spans


@pytest.mark.parametrize(
    ("refusal", "status", "failed", "error"),
    [
        (None, 400, False, "invalid_value"),
        (EngineFailed("gone"), 503, True, "engine_failed"),
        (ValueError(CANARY), 500, True, "internal_error"),
    ],
)
async def test_errors_are_told(
    world: ApiWorld,
    kept: KeptSpans,
    http: httpx.AsyncClient,
    lines: KeptLines,
    refusal: Exception | None,
    status: int,
    failed: bool,
    error: str | None,
) -> None:
    world.engine.refusal = refusal
    body = ASKED if refusal is not None else {**ASKED, "n": 0}
    assert (await http.post(CHAT, json=body)).status_code == status
    span = kept.only(f"POST {CHAT}")
    assert attributes(span)["http.response.status_code"] == status
    assert attributes(span).get("error.type") == error
    assert (span.status.status_code is StatusCode.ERROR) is failed
    (line,) = access(lines)
    assert (line["status"], line.get("error")) == (status, error)
    assert "canary" not in lines.told() + "".join(each.to_json() for each in kept.spans)


async def test_a_stream_that_breaks_is_an_error_under_a_good_status(
    world: ApiWorld, kept: KeptSpans, http: httpx.AsyncClient, lines: KeptLines
) -> None:
    world.engine.enqueue(FakeAnswer(("one", " two", " three"), fail_after=1, error=ValueError(CANARY)))
    response = await http.post(CHAT, json={**ASKED, "stream": True})
    assert response.status_code == 200
    span = kept.only(f"POST {CHAT}")
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == access(lines)[0]["error"] == "internal_error"
    assert "canary" not in lines.told()
    assert "what it says is withheld" in lines.told(), "the traceback is there"


async def test_without_tracing_lines_and_requests_still_know_whose_they_are(
    world: ApiWorld, http: httpx.AsyncClient, lines: KeptLines
) -> None:
    await http.post(TEXT, json={"model": BASE, "prompt": ["a", "b"], "max_tokens": 3}, headers={"x-request-id": "mine"})
    (line,) = access(lines)
    wanted = {"request_id": "mine", "tenant": "demo", "model": BASE, "method": "POST", "route": TEXT, "status": 200}
    assert {name: line.get(name) for name in wanted} == wanted
    assert (line["prompt_tokens"], line["completion_tokens"], line["finish_reason"]) == (2, 6, "length")
    assert "trace_id" not in line
    assert [request.origin and request.origin.request_id for request in world.engine.requests] == ["mine", "mine"]


async def test_an_unsampled_trace_is_in_the_lines_alone(
    world: ApiWorld, kept: KeptSpans, http: httpx.AsyncClient, lines: KeptLines
) -> None:
    await http.post(CHAT, json=ASKED, headers={"traceparent": UNSAMPLED})
    assert not kept.spans
    assert access(lines)[0]["trace_id"] == TRACE_ID
    assert world.engine.requests[0].origin is not None
    assert not world.engine.requests[0].origin.sampled


async def test_the_admin_acting_for_a_tenant_is_that_tenant(world: ApiWorld, lines: KeptLines) -> None:
    async with world.client(ADMIN_KEY, **{"X-Slipstream-Tenant": "acme"}) as client:
        await client.get("/v1/models")
        await client.get("/v1/nowhere")
    first, second = access(lines)
    assert (first["tenant"], first["status"]) == ("acme", 200)
    assert (second["route"], second["status"]) == ("unmatched", 404)
    assert "tenant" not in second, "nobody was asked who they are"


async def test_prompts_are_told_for_the_tenant_that_wants_it_and_for_no_other(
    world: ApiWorld, kept: KeptSpans, admin: httpx.AsyncClient, lines: KeptLines
) -> None:
    made = (await admin.put("/v1/tenants/loud", json={"log_prompts": True})).json()
    assert made["log_prompts"] is True
    assert (await admin.get("/v1/tenants/loud")).json() == made
    answers = {"loud": "shout it", "demo": "hush now"}
    for tenant, answer in answers.items():
        world.engine.enqueue(answer)
        async with world.client(await world.key(tenant)) as client:
            body = {**ASKED, "messages": [{"role": "user", "content": f"from {tenant} sk-slip-0123456789abc"}]}
            assert (await client.post(CHAT, json=body)).status_code == 200
    (line,) = [each for each in lines.records if each.getMessage() == "prompt and answer"]
    assert line.__dict__["prompt"] == "user: from loud [redacted]"
    assert (line.__dict__["answer"], line.__dict__["tenant"]) == ("shout it", "loud")
    loud, quiet = kept.named(f"POST {CHAT}")
    (event,) = loud.events
    assert "shout it" in str((event.attributes or {})["gen_ai.output.messages"])
    assert not quiet.events
    everything = lines.told() + "".join(span.to_json() for span in kept.spans)
    assert "hush" not in everything
    assert "from demo" not in everything
    (await admin.put("/v1/tenants/loud", json={})).raise_for_status()
    assert (await admin.get("/v1/tenants/loud")).json()["log_prompts"] is False
    audit = (await admin.get("/v1/audit", params={"tenant": "loud"})).json()["data"]
    changes = [entry for entry in audit if entry["action"] == "tenant.changed"]
    assert [(entry["by"], '"log_prompts":true' in entry["detail"]) for entry in changes] == [
        ("admin", False),
        ("admin", True),
    ]


async def test_a_name_that_would_forge_a_line_is_not_repeated(http: httpx.AsyncClient, lines: KeptLines) -> None:
    for name, shown in (("no-such", "no-such"), ("x\nERROR all is lost", None), ("y" * 201, None)):
        assert (await http.post(CHAT, json={**ASKED, "model": name})).status_code == 404
        assert access(lines)[-1].get("model") == shown


async def test_only_the_admin_switches_it_on(world: ApiWorld, http: httpx.AsyncClient) -> None:
    assert (await http.put("/v1/tenants/demo", json={"log_prompts": True})).status_code == 403
    async with world.client(ADMIN_KEY) as admin:
        assert (await admin.put("/v1/tenants/demo", json={"log_prompts": "yes"})).status_code == 400


async def test_an_answer_that_cannot_be_sent_is_cut_without_a_word_about_it(world: ApiWorld, lines: KeptLines) -> None:
    """The server that carries the application logs what is raised into it."""
    app: Any = world.app
    key = await world.key()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise ValueError(CANARY)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http", "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models", "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key}".encode())], "server": ("test", 80), "scheme": "http",
        "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    with pytest.raises(AnswerCut) as caught:
        await app(scope, receive, send)
    assert "canary" not in repr(caught.value) + repr(caught.value.__cause__)
    assert caught.value.__suppress_context__
    assert "canary" not in lines.told()
