"""A request on the running server, as its trace and its log lines tell it; and what neither may ever hold."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.otlp import Collector, SentSpan, only
from support.processes import eventually
from support.serving import Running

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.timeout(600)]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HOPS = ("route", "replica", "engine", "prefill", "decode", "step")


def traced() -> tuple[str, str]:
    """A trace id, and the header of a client that has it sampled."""
    trace_id = secrets.token_hex(16)
    return trace_id, f"00-{trace_id}-{secrets.token_hex(8)}-01"


def log_files(server: Running) -> list[Path]:
    """Everything that Serve, Ray, the gateway and the replica write."""
    folders = (server.home / "logs", server.scratch)
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in {".log", ".out", ".err", ".txt"}
    ]


def logged(server: Running, request_id: str) -> list[Mapping[str, Any]]:
    """The lines of one request, out of Serve's JSON logs."""
    found = []
    for path in (server.home / "logs" / "serve").rglob("*.log"):
        for line in path.read_text().splitlines():
            if request_id in line:
                found.append(json.loads(line))
    return found


@pytest.fixture
def http(published: Running) -> Iterator[httpx.Client]:
    with published.client() as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_one_trace_shows_the_four_hops(
    http: httpx.Client, published: Running, collector: Collector, stream: bool
) -> None:
    trace_id, header = traced()
    body = {"model": "snips", "prompt": "play some jazz", "max_tokens": 12, "temperature": 0, "stream": stream}
    headers = {"traceparent": header, "tracestate": "vendor=7", "x-request-id": f"hops-{trace_id}"}
    answer = http.post(TEXT, json=body, headers=headers)
    assert answer.status_code == 200

    spans = collector.wait_for(trace_id, f"POST {TEXT}", *HOPS)
    gateway, route, replica, engine = (only(spans, name) for name in (f"POST {TEXT}", "route", "replica", "engine"))
    prefill, decode = only(spans, "prefill"), only(spans, "decode")
    assert [span.service for span in (gateway, route, replica, engine)] == [
        "slipstream-gateway", "slipstream-gateway", "slipstream-engine", "slipstream-engine"
    ]  # fmt: skip
    assert gateway.parent_id == header.split("-")[2], "beneath the client's own span"
    parents = {route: gateway, replica: route, engine: replica, prefill: engine, decode: engine}
    assert {span.name: span.parent_id for span in parents} == {s.name: p.span_id for s, p in parents.items()}
    steps = [span for span in spans if span.name == "step"]
    assert {step.parent_id for step in steps} == {prefill.span_id, decode.span_id}
    assert all(outer.start_ns <= inner.start_ns + 2_000_000 for inner, outer in parents.items())

    _check_gateway(gateway, f"hops-{trace_id}")
    digest = next(v["digest"] for v in http.get("/v1/adapters/snips").json()["versions"])
    for span in (gateway, route, replica, engine):
        assert span.attributes["slipstream.adapter"] == digest
        assert not span.failed
    assert route.attributes["slipstream.try"] == 1
    assert route.attributes["slipstream.adapter.tier"] in {"device", "host", "coming", "absent"}
    assert route.events["replica chosen"]["slipstream.replica"]
    assert engine.attributes["gen_ai.usage.output_tokens"] == 12
    assert {"first step", "first token"} <= set(engine.events)
    ran = sum(step.attributes["slipstream.step.tokens"] for step in steps)
    assert 0 < ran <= 12
    assert decode.attributes["slipstream.steps"] == engine.attributes["slipstream.decode_steps"] - 1


def _check_gateway(gateway: SentSpan, request_id: str) -> None:
    wanted = {
        "http.request.method": "POST",
        "http.route": TEXT,
        "http.response.status_code": 200,
        "slipstream.request_id": request_id,
        "slipstream.tenant": "demo",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.response.model": "snips@1",
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.request.model": "snips",
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert {name: gateway.attributes.get(name) for name in wanted} == wanted


def test_every_line_of_a_request_says_whose_it_is(http: httpx.Client, published: Running) -> None:
    trace_id, header = traced()
    request_id = f"lines-{trace_id}"
    headers = {"traceparent": header, "x-request-id": request_id}
    body = {"model": "wikisql", "prompt": "select", "max_tokens": 4}
    assert http.post(TEXT, json=body, headers=headers).status_code == 200
    # The access line is written when the last byte is out, which its reader may see first.
    assert eventually(lambda: any(line["message"] == f"POST {TEXT} 200" for line in logged(published, request_id)))
    lines = logged(published, request_id)
    (access,) = [line for line in lines if line["message"] == f"POST {TEXT} 200"]
    assert (access["levelname"], access["name"]) == ("INFO", "slipstream.access")
    wanted = {"route": TEXT, "status": 200, "completion_tokens": 4, "finish_reason": "length", "model": "wikisql@1"}
    assert {name: access[name] for name in wanted} == wanted
    assert access["seconds"] > 0
    assert access["decode_steps"] >= 1
    admitted = [line for line in lines if line["message"].startswith("admitted:")]
    assert len(admitted) == 1, "the replica's own"
    for line in (access, *admitted):
        assert (line["request_id"], line["tenant"], line["trace_id"]) == (request_id, "demo", trace_id)
        assert line["adapter"].startswith("sha256:")


def test_neither_prompts_nor_keys_are_told(published: Running, collector: Collector) -> None:
    """Through every kind of route, and through what goes wrong; everything logs at DEBUG."""
    canary = f"canary{secrets.token_hex(8)}"
    bearer = f"sk-slip-{canary}key"
    trace_id, header = traced()
    with published.client() as http:
        http.headers.update({"traceparent": header})
        chat = {"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": canary}], "max_tokens": 2}
        for body in (
            chat,
            {**chat, "stream": True},
            {**chat, "n": 0},
            {**chat, "temperature": canary},
            {**chat, "model": "no"},
        ):
            http.post(CHAT, json=body)
        for prompt, most in ((canary, 2), ([canary, canary], 2), (canary, 100_000)):  # the last does not fit
            http.post(TEXT, json={"model": "snips", "prompt": prompt, "max_tokens": most, "logprobs": 1})
        http.post(TEXT, content=f'{{"prompt": "{canary}"', headers={"content-type": "application/json"})
        http.post(TEXT, json={"model": "snips", "prompt": "x", "stop": [canary], "user": canary})
        http.get("/v1/models", params={"key": canary})
        http.post(CHAT, json=chat, headers={"authorization": f"Bearer {bearer}"})
        http.post("/v1/files", files={"file": ("a.jsonl", f'{{"prompt": "{canary}"}}')}, data={"purpose": "fine-tune"})
        http.post("/v1/files", files={"file": ("a.jsonl", canary)}, data={"purpose": "fine-tune"})
        http.post(f"/v1/adapters/snips/{canary}")
    spans = collector.wait_for(trace_id, f"POST {CHAT}", f"POST {TEXT}", "engine")
    assert len(spans) > 20
    secret = [canary.encode(), published.key.encode(), published.admin_key.encode()]
    told = [value for value in secret for body in collector.bodies if value in _but_paths(body, canary)]
    assert told == []
    files = log_files(published)
    assert any("Gateway" in path.name for path in files)
    assert any("EngineReplica" in path.name for path in files)
    assert any(trace_id in path.read_text(errors="replace") for path in files)
    for path in files:
        content = _but_paths(path.read_bytes(), canary)
        assert [value for value in secret if value in content] == [], path


def _but_paths(content: bytes, canary: str) -> bytes:
    """A path that a client asks for is no secret: it is where errors are looked for."""
    return content.replace(f"/v1/adapters/snips/{canary}".encode(), b"")


def test_a_tenant_may_have_its_own_prompts_logged(published: Running, collector: Collector) -> None:
    admin = httpx.Client(
        base_url=published.url, headers={"Authorization": f"Bearer {published.admin_key}"}, trust_env=False
    )
    loud, quiet = f"loud{secrets.token_hex(8)}", f"quiet{secrets.token_hex(8)}"
    trace_id, header = traced()
    with admin:
        assert admin.put("/v1/tenants/loud", json={"log_prompts": True}).json()["log_prompts"] is True
        for tenant, text in (("loud", loud), ("quiet", quiet)):
            body = {"model": "SmolLM2-135M-Instruct", "prompt": text, "max_tokens": 2}
            headers = {"X-Slipstream-Tenant": tenant, "traceparent": header, "x-request-id": f"log-{text}"[:40]}
            assert admin.post(TEXT, json=body, headers=headers).status_code == 200
        audit = admin.get("/v1/audit", params={"tenant": "loud"}).json()["data"]
    assert any(entry["action"] == "tenant.changed" and '"log_prompts":true' in entry["detail"] for entry in audit)

    def lines() -> list[Mapping[str, Any]]:
        return [line for line in logged(published, loud) if line["message"] == "prompt and answer"]

    assert eventually(lambda: bool(lines()))
    (line,) = lines()
    assert line["prompt"] == loud
    assert line["answer"]
    assert line["tenant"] == "loud"
    assert eventually(lambda: len([s for s in collector.trace(trace_id) if s.name == f"POST {TEXT}"]) == 2)
    events = [event for span in collector.trace(trace_id) for event in span.events.values()]
    assert any(loud in event.get("gen_ai.input.messages", "") for event in events)
    everything = b"".join(collector.bodies) + b"".join(path.read_bytes() for path in log_files(published))
    assert quiet.encode() not in everything.replace(f"log-{quiet}"[:40].encode(), b"")
