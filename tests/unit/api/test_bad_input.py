"""Every kind of bad input gets the right status, names its field and says a sentence; never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from support.api_app import BASE, ApiWorld

from adapter_registry.records import PromptFormat
from slipstream.testing import FakeAnswer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
UNKNOWN = ["nobody", "No Body!", "a/b/c", "sql@", "sql@99", "../etc", "theirs", "other/theirs", "@", "x" * 300]
HELLO = [{"role": "user", "content": "hi"}]


def problem(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, its shape checked."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert error["type"]
    assert error["code"]
    return error


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", 2**40),
        ("min_p", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 11),
        ("n", 0),
        ("n", 17),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 10**30),
        ("min_tokens", -1),
        ("seed", 2**64),
        ("seed", 10**4000),
        ("seed", 1.5),
        ("stop", ["x"] * 17),
        ("stop", ""),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", {}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "x"),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", [1]),
        ("speculation", 9),
        ("speculation", -1),
        ("speculation", "fast"),
        ("speculation", 1.0),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("stream_options", {"include_all": True}),
        ("model", 7),
        ("model", ""),
        ("model", None),
        ("frobnicate", 1),
    ],
)
@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_bad_fields_are_named(http: httpx.AsyncClient, route: str, param: str, value: Any) -> None:
    body: dict[str, Any] = {"model": BASE, "messages": HELLO} if route == CHAT else {"model": BASE, "prompt": "x"}
    body[param] = value
    error = problem(await http.post(route, json=body))
    assert error["param"].startswith(param)
    assert param in error["message"]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_completion_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ],
)
async def test_bad_chat_requests(http: httpx.AsyncClient, extra: dict[str, Any], param: str) -> None:
    error = problem(await http.post(CHAT, json={"model": BASE, "messages": HELLO, **extra}))
    assert error["param"] == param


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": HELLO}, "messages"),
        ({"max_completion_tokens": 2}, "max_completion_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 40, "n": 4}, "prompt"),
    ],
)
async def test_bad_completion_requests(http: httpx.AsyncClient, extra: dict[str, Any], param: str) -> None:
    error = problem(await http.post(TEXT, json={"model": BASE, "prompt": "x", **extra}))
    assert error["param"] == param


async def test_a_missing_field_is_named(http: httpx.AsyncClient) -> None:
    assert problem(await http.post(TEXT, json={"model": BASE}))["message"] == "The field 'prompt' is missing."


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"temperature": None, "stop": None, "n": None, "logit_bias": None, "stream_options": None, "seed": None},
        {"stop": ["a", "b"], "stream": False, "speculation": "auto"},
    ],
)
@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_harmless_fields_are_taken(http: httpx.AsyncClient, route: str, extra: dict[str, Any]) -> None:
    body = {"model": BASE, "messages": HELLO} if route == CHAT else {"model": BASE, "prompt": "x"}
    response = await http.post(route, json=body | extra)
    assert response.status_code == 200, response.text


async def test_unused_chat_fields_are_taken(http: httpx.AsyncClient) -> None:
    unused = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    response = await http.post(CHAT, json={"model": BASE, "messages": HELLO, "parallel_tool_calls": True, **unused})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"model": ' + b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"model": "x", "prompt": "y", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "fake/base-1b", "prompt": "y", "temperature": NaN}',
        b'{"model": "fake/base-1b", "prompt": "y", "temperature": Infinity}',
        b'{"model": "fake/base-1b", "prompt": "y", "temperature": 1e999}',
        b'{"model": "fake/base-1b", "prompt": "y", "logit_bias": {"1": NaN}}',
        b'{"model": "fake/base-1b", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "fake/base-1b", "prompt": "x", "stop": "\\udfff"}',
        b'{"model": "fake/base-1b", "prompt": "x", "\\ud800": 1}',
        b'{"model": "fake/base-1b", "prompt": "x", "suffix": "\\ud800"}',
    ],
)
async def test_bodies_that_are_not_good_json(http: httpx.AsyncClient, body: bytes) -> None:
    problem(await http.post(TEXT, content=body, headers={"content-type": "application/json"}))


async def test_a_body_of_another_type_is_refused(http: httpx.AsyncClient) -> None:
    body = json.dumps({"model": BASE, "prompt": "x"})
    error = problem(await http.post(TEXT, content=body, headers={"content-type": "text/plain"}))
    assert "application/json" in error["message"]


async def test_long_field_names_are_cut(http: httpx.AsyncClient) -> None:
    response = await http.post(TEXT, json={"model": BASE, "prompt": "x", "y" * 100_000: 1})
    assert len(problem(response)["param"]) <= 100
    assert len(response.content) < 1000


async def test_bodies_over_the_cap(http: httpx.AsyncClient, world: ApiWorld) -> None:
    world.rebuild(max_body_bytes=1000)
    async with world.client(await world.key()) as client:
        error = problem(await client.post(TEXT, json={"model": BASE, "prompt": "x" * 2000}), 413)
        assert error["code"] == "payload_too_large"

        async def unannounced() -> Any:
            for _ in range(100):
                yield b" " * 100

        headers = {"content-type": "application/json"}
        problem(await client.post(TEXT, content=unannounced(), headers=headers), 413)


@pytest.mark.parametrize("model", UNKNOWN)
@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_unknown_and_foreign_models_look_the_same(
    http: httpx.AsyncClient, world: ApiWorld, route: str, model: str
) -> None:
    await world.publish("theirs", tenant="other")
    error = problem(
        await http.post(
            route, json={"model": model, "messages": HELLO} if route == CHAT else {"model": model, "prompt": "x"}
        ),
        404,
    )
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert (
        error["message"].replace(model[:200], "M").startswith("The model 'M' does not exist, or you do not have access")
    )


async def test_a_prompt_longer_than_the_context(http: httpx.AsyncClient) -> None:
    error = problem(await http.post(TEXT, json={"model": BASE, "prompt": "word " * 300}))
    assert error["code"] == "context_length_exceeded"
    streamed = await http.post(TEXT, json={"model": BASE, "prompt": "word " * 300, "stream": True})
    assert problem(streamed)["code"] == "context_length_exceeded"


async def test_one_of_several_prompts_is_too_long(http: httpx.AsyncClient, world: ApiWorld) -> None:
    world.engine.step_delay_s = 0.01
    problem(await http.post(TEXT, json={"model": BASE, "prompt": ["short", "word " * 300], "stream": True}))
    assert world.engine.running == set()


async def test_a_full_queue_says_when_to_come_back(http: httpx.AsyncClient, world: ApiWorld) -> None:
    world.engine.capacity = 0
    for stream in (False, True):
        response = await http.post(CHAT, json={"model": BASE, "messages": HELLO, "stream": stream})
        assert problem(response, 429)["code"] == "overloaded"
        assert response.headers["retry-after"] == "2"


async def test_a_raw_adapter_refuses_chat(http: httpx.AsyncClient, world: ApiWorld) -> None:
    await world.publish("sql", prompt_format=PromptFormat.RAW)
    error = problem(await http.post(CHAT, json={"model": "sql", "messages": HELLO}))
    assert "/v1/completions" in error["message"]
    assert (await http.post(TEXT, json={"model": "sql", "prompt": "x"})).status_code == 200


async def test_errors_after_the_first_chunk_end_the_stream(http: httpx.AsyncClient, world: ApiWorld) -> None:
    world.engine.enqueue(FakeAnswer(("a", " b", " c"), fail_after=1, error=RuntimeError("secret detail")))
    response = await http.post(TEXT, json={"model": BASE, "prompt": "x", "stream": True})
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    assert "secret" not in response.text
    last = json.loads(response.text.strip().split("data: ")[-1])
    assert last["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] in last["error"]["message"]


async def test_a_bug_is_a_500_that_tells_nothing(
    http: httpx.AsyncClient, world: ApiWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.engine.refusal = RuntimeError("secret detail")
    response = await http.post(TEXT, json={"model": BASE, "prompt": "x"}, headers={"x-request-id": "mine-1"})
    error = problem(response, 500)
    assert "mine-1" in error["message"]
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


async def test_a_slow_answer_times_out(http: httpx.AsyncClient, world: ApiWorld) -> None:
    world.rebuild(request_timeout_s=0.05)
    world.engine.step_delay_s = 0.03
    async with world.client(await world.key()) as client:
        assert problem(await client.post(TEXT, json={"model": BASE, "prompt": "x"}), 504)["code"] == "timeout"
        streamed = await client.post(TEXT, json={"model": BASE, "prompt": "x", "stream": True})
        assert '"timeout"' in streamed.text
        world.engine.step_delay_s = 5
        problem(await client.post(TEXT, json={"model": BASE, "prompt": ["x", "y"], "stream": True}), 504)
    assert world.engine.running == set()


async def test_unknown_routes_and_methods(http: httpx.AsyncClient) -> None:
    assert problem(await http.get("/v2/nothing"), 404)["message"].startswith("There is no route /v2/nothing")
    response = await http.get(CHAT)
    assert problem(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


HALF = "\ud800"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": HALF}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": "hi", "name": HALF}]}, "messages.0.name"),
        (CHAT, {"messages": HELLO, "stop": HALF}, "stop.0"),
        (CHAT, {"messages": HELLO, "model": HALF}, "model"),
        (TEXT, {"prompt": ["x", HALF]}, "prompt"),
        ("/v1/keys", {"tenant": "acme", "label": HALF}, "label"),
        ("/v1/keys", {"tenant": HALF}, "tenant"),
    ],
)
async def test_half_a_surrogate_pair_is_no_text(
    http: httpx.AsyncClient, world: ApiWorld, path: str, body: dict[str, Any], param: str
) -> None:
    sent = json.dumps(body if path == "/v1/keys" else {"model": BASE, **body})
    error = problem(await http.post(path, content=sent, headers={"content-type": "application/json"}))
    assert (error["code"], error["param"]) == ("invalid_value", param)
    assert world.engine.requests == []


@pytest.mark.parametrize("body", [[], [1], "text", 3])
async def test_a_body_that_is_no_object(http: httpx.AsyncClient, body: Any) -> None:
    message = problem(await http.post(CHAT, json=body))["message"]
    assert message == "The body must be a JSON object, neither a list nor a bare value."


async def test_a_message_that_is_no_object(http: httpx.AsyncClient) -> None:
    error = problem(await http.post(CHAT, json={"model": BASE, "messages": [[]]}))
    assert error["message"] == "'messages.0' must be a JSON object."


async def test_more_choices_than_ever_fit_are_no_overload(http: httpx.AsyncClient, world: ApiWorld) -> None:
    world.engine.capacity = 2
    assert problem(await http.post(TEXT, json={"model": BASE, "prompt": "x", "n": 3}))["param"] == "n"
    assert (await http.post(TEXT, json={"model": BASE, "prompt": "x", "n": 2})).status_code == 200
