"""The openai package against the running application: real rows, real adapters, everybody at once."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest
from support.metrics_page import parse, total
from support.serving import MODEL, Running
from support.shared import shared_path

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.timeout(600)]

DATA = {"snips": "snips_slots", "wikisql": "sql_wikisql"}


def rows(task: str, count: int) -> list[str]:
    with shared_path("data", DATA[task], "test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(next(lines))["prompt"] for _ in range(count)]


def async_client(server: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=300)


def sync_client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=300)


async def complete(client: openai.AsyncOpenAI, model: str, prompt: str, **extra: Any) -> Any:
    return await client.completions.create(model=model, prompt=prompt, max_tokens=64, temperature=0, extra_body=extra)


def per_step(answers: list[Any]) -> float:
    return float(sum(a.usage.completion_tokens for a in answers) / sum(a.usage.decode_steps for a in answers))


async def test_test_rows_to_every_adapter_and_the_base_at_once(published: Running) -> None:
    """Answers do not depend on company or speculation, and the speculators pay."""
    async with async_client(published) as client:
        calls = [(task, prompt) for task in DATA for prompt in rows(task, 8)]
        calls += [(MODEL, prompt) for prompt in rows("snips", 4)]
        together = await asyncio.gather(*(complete(client, model, prompt) for model, prompt in calls))
        plain = await asyncio.gather(*(complete(client, model, prompt, speculation=False) for model, prompt in calls))
        alone = {task: [await complete(client, task, prompt) for prompt in rows(task, 4)] for task in DATA}
    differing = sum(a.choices[0].text != b.choices[0].text for a, b in zip(together, plain, strict=True))
    assert differing <= 1  # bf16: rare, not promised
    for task, floor in (("snips", 1.8), ("wikisql", 1.5)):
        mine = [a for a, (model, _) in zip(together, calls, strict=True) if model == task]
        assert all(a.model == f"{task}@1" for a in mine)
        assert [a.choices[0].text for a in alone[task]] == [a.choices[0].text for a in mine[:4]]
        assert per_step(alone[task]) > floor
        assert sum(a.usage.completion_tokens_details.accepted_prediction_tokens for a in alone[task]) > 0
    choices = [a.choices[0] for a, (model, _) in zip(together, calls, strict=True) if model == "snips"]
    ended = [json.loads(choice.text) for choice in choices if choice.finish_reason == "stop"]
    assert len(ended) >= len(choices) - 2, "answers of up to 64 tokens, nearly all of them"
    assert all("intent" in answer for answer in ended)
    assert per_step(plain) == 1.0


def test_the_synchronous_client_chats_and_lists(published: Running) -> None:
    with sync_client(published) as client:
        names = [model.id for model in client.models.list()]
        assert names[0] == MODEL
        assert {"snips", "wikisql"} <= set(names)
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=16,
            temperature=0, logprobs=True, top_logprobs=2,
        )  # fmt: skip
        assert "Paris" in str(answer.choices[0].message.content)
        scores = answer.choices[0].logprobs
        assert scores is not None
        assert scores.content is not None
        assert answer.usage is not None
        assert len(scores.content) == answer.usage.completion_tokens
        with pytest.raises(openai.BadRequestError, match="raw"):
            client.chat.completions.create(model="snips", messages=[{"role": "user", "content": "hello"}])
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt="x")


async def test_streams_are_the_whole_answer_in_pieces(published: Running) -> None:
    prompt = rows("snips", 1)[0]
    async with async_client(published) as client:
        whole = await complete(client, "snips", prompt)
        chunks = [
            chunk
            async for chunk in await client.completions.create(
                model="snips", prompt=prompt, max_tokens=64, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )
        ]  # fmt: skip
    text = "".join(c.choices[0].text for c in chunks if c.choices)
    assert text == whole.choices[0].text
    assert len([c for c in chunks if c.choices and c.choices[0].text]) > 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_four_choices_under_load_never_hang(published: Running) -> None:
    async with async_client(published) as client, asyncio.timeout(180):
        prompt = rows("wikisql", 1)[0]
        background = [complete(client, "snips", p) for p in rows("snips", 12)]
        several = [
            client.completions.create(model="wikisql", prompt=prompt, n=4, temperature=0.8, seed=s, max_tokens=24)
            for s in range(6)
        ]
        answers = await asyncio.gather(*several, *background)
    assert all(len(a.choices) == 4 for a in answers[:6])
    assert len({c.text for a in answers[:6] for c in a.choices}) > 6


async def test_an_adapter_answers_within_five_seconds_of_its_201(published: Running) -> None:
    folder = shared_path("adapters", "snips-turbo")
    files = [
        ("files", (name, (folder / name).read_bytes())) for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    headers = {"Authorization": f"Bearer {published.key}"}
    async with httpx.AsyncClient(base_url=published.url, headers=headers, timeout=60, trust_env=False) as client:
        created = await client.post("/v1/adapters", data={"name": "fresh"}, files=files)
        began = time.monotonic()
        assert created.status_code == 201, created.text
        answer = await client.post("/v1/completions", json={"model": "fresh", "prompt": "hi", "max_tokens": 4})
        assert answer.status_code == 200, answer.text
        assert time.monotonic() - began < 5
        assert (await client.delete("/v1/adapters/fresh")).status_code == 200
        gone = await client.post("/v1/completions", json={"model": "fresh", "prompt": "hi"})
        assert gone.status_code == 404


async def test_a_client_that_goes_away_frees_its_blocks(published: Running) -> None:
    async with async_client(published) as client:
        stream = await client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        await stream.close()

    async with httpx.AsyncClient(base_url=published.url, trust_env=False) as plain, asyncio.timeout(30):
        while total(parse((await plain.get("/metrics")).text), "slipstream_engine_running_sequences", model=MODEL):
            await asyncio.sleep(0.1)


async def test_tenants_cannot_see_each_other(published: Running) -> None:
    admin = {"Authorization": f"Bearer {published.admin_key}"}
    async with httpx.AsyncClient(base_url=published.url, timeout=60, trust_env=False) as client:
        made = await client.post("/v1/keys", json={"tenant": "acme"}, headers=admin)
        assert made.status_code == 201, made.text
        acme = {"Authorization": f"Bearer {made.json()['secret']}"}
        body = {"model": "snips", "prompt": "x", "max_tokens": 1}
        other = await client.post("/v1/completions", json=body, headers=acme)
        unknown = await client.post("/v1/completions", json={**body, "model": "snipz"}, headers=acme)
        assert other.status_code == unknown.status_code == 404
        same = [r.json()["error"]["message"].replace("snipz", "snips") for r in (other, unknown)]
        assert same[0] == same[1]
        assert (await client.get("/v1/adapters", headers=acme)).json()["data"] == []


def test_one_request_id_per_response(published: Running) -> None:
    with published.client() as client:
        for path in ("/healthz", "/v1/models", "/nowhere"):
            assert client.get(path, headers={"x-request-id": "mine-1"}).headers.get_list("x-request-id") == ["mine-1"]
            for headers in ({}, {"x-request-id": "two words"}, {"x-request-id": "x" * 129}):
                (given,) = client.get(path, headers=headers).headers.get_list("x-request-id")
                assert given not in headers.values()
