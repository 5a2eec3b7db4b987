"""Quotas and usage, as tenants and the admin see them."""

from __future__ import annotations

import asyncio
import csv
from datetime import timedelta
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, RateLimitError
from support.api_app import ADMIN_KEY, BASE, ApiWorld

from adapter_registry.errors import StoreUnavailable
from adapter_registry.records import utc_now
from adapter_registry.tenants import UsageCounts
from slipstream.api.metering import Meter
from slipstream.errors import QuotaExceeded
from slipstream.testing import FakeAnswer

PROMPT = {"model": BASE, "prompt": "one two three four", "max_tokens": 8}


async def limit(admin: httpx.AsyncClient, tenant: str = "demo", weight: float = 1.0, **quota: Any) -> dict[str, Any]:
    response = await admin.put(f"/v1/tenants/{tenant}", json={"quota": quota, "weight": weight})
    assert response.status_code == 200, response.text
    return dict(response.json())


def meter_of(world: ApiWorld) -> Meter:
    found: Meter = world.app.state.runtime.meter
    return found


async def used(world: ApiWorld, http: httpx.AsyncClient) -> dict[str, int]:
    assert await meter_of(world).flush()
    total: dict[str, int] = (await http.get("/v1/usage")).json()["total"]
    return total


async def test_settings_are_set_listed_and_shown(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient
) -> None:
    made = await limit(admin, requests_per_minute=60, weight=2)
    assert made["quota"] == {
        "requests_per_minute": 60, "tokens_per_minute": None, "concurrent_requests": None, "tokens_per_month": None,
        "storage_bytes": None,
    }  # fmt: skip
    assert made["weight"] == 2
    assert (await http.get("/v1/tenants/demo")).json() == made
    await world.key("other")
    listed = (await admin.get("/v1/tenants")).json()["data"]
    assert [each["tenant"] for each in listed] == ["demo", "other"]
    assert (await http.get("/v1/tenants/other")).status_code == 403
    assert (await http.get("/v1/tenants")).status_code == 403
    assert (await http.put("/v1/tenants/demo", json={})).status_code == 403


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"quota": {"requests_per_minute": 0}}, "quota.requests_per_minute"),
        ({"quota": {"tokens": 5}}, "quota.tokens"),
        ({"quota": {"tokens_per_month": "7"}}, "quota.tokens_per_month"),
        ({"weight": 0}, "weight"),
        ({"weight": "NaN"}, "weight"),
        ({"limits": {}}, "limits"),
    ],
)
async def test_settings_that_make_no_sense_are_refused_by_name(
    admin: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await admin.put("/v1/tenants/demo", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert (await admin.put("/v1/tenants/No Name", json={})).json()["error"]["code"] == "invalid_name"


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_say_what_is_left_as_openai_does(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient, route: str, stream: bool
) -> None:
    body: dict[str, Any] = {**PROMPT, "stream": stream}
    if route.startswith("chat"):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    assert not any(name.startswith("x-ratelimit") for name in (await http.post(f"/v1/{route}", json=body)).headers)
    await limit(admin, requests_per_minute=60, tokens_per_minute=6000)
    headers = (await http.post(f"/v1/{route}", json=body)).headers
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "59"
    assert headers["x-ratelimit-reset-requests"] == "1.000s"
    assert headers["x-ratelimit-limit-tokens"] == "6000"
    assert headers["x-ratelimit-remaining-tokens"] == str(6000 - 8 - 5)  # the answer, and 18 characters of prompt
    assert headers["x-ratelimit-reset-tokens"] == "0.130s"


async def test_a_refusal_names_the_quota_and_when_to_come_back(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient, openai: AsyncOpenAI
) -> None:
    await limit(admin, requests_per_minute=2)
    for _ in range(2):
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
    refused = await http.post("/v1/completions", json=PROMPT)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "30"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["message"] == "The tenant 'demo' has used up its quota. Its quota is 2 requests a minute."
    world.clock.advance(30)
    assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
    assert len(world.engine.requests) == 3


async def test_the_openai_client_sees_a_rate_limit(admin: httpx.AsyncClient, openai: AsyncOpenAI) -> None:
    await limit(admin, tokens_per_minute=10)
    await openai.completions.create(model=BASE, prompt="a", max_tokens=8)
    with pytest.raises(RateLimitError, match="10 tokens a minute"):
        await openai.completions.create(model=BASE, prompt="a", max_tokens=8)


async def test_requests_at_once(world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient) -> None:
    world.engine.step_delay_s = 0.02
    await limit(admin, concurrent_requests=2)
    answers = await asyncio.gather(*(http.post("/v1/completions", json=PROMPT) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
    assert await meter_of(world).flush()
    assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200


async def test_tokens_of_a_month(world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient) -> None:
    await limit(admin, tokens_per_month=5)
    assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
    await used(world, http)
    refused = await http.post("/v1/completions", json=PROMPT)
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert 0 < int(refused.headers["retry-after"]) <= 31 * 86_400


async def test_usage_is_what_the_answers_said(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient
) -> None:
    await world.publish("sql")
    sums = dict.fromkeys(("prompt_tokens", "completion_tokens"), 0)
    for model, n in (("sql", 1), (BASE, 1), ("sql@1", 2)):
        body = {**PROMPT, "model": model, "n": n, "temperature": 1.0}
        usage = (await http.post("/v1/completions", json=body)).json()["usage"]
        for name in sums:
            sums[name] += usage[name]
    total = await used(world, http)
    assert total["requests"] == 3
    assert {name: total[name] for name in sums} == sums
    assert total["drafted_tokens"] >= total["accepted_tokens"] > 0
    page = (await http.get("/v1/usage")).json()
    today = utc_now().date()
    assert [(row["day"], row["model"], row["requests"]) for row in page["data"]] == [
        (today.isoformat(), BASE, 1), (today.isoformat(), "sql@1", 2),
    ]  # fmt: skip
    assert page["start"] == (today - timedelta(days=29)).isoformat()
    table = list(csv.DictReader((await http.get("/v1/usage?format=csv")).text.splitlines()))
    assert sum(int(row["completion_tokens"]) for row in table) == sums["completion_tokens"]
    async with world.client(await world.key("other")) as other:
        assert (await other.get("/v1/usage")).json()["data"] == []


async def test_a_stream_that_breaks_is_counted_as_far_as_it_came(world: ApiWorld, http: httpx.AsyncClient) -> None:
    world.engine.enqueue(FakeAnswer(tuple("abcdefgh"), fail_after=2))
    body = {**PROMPT, "stream": True, "speculation": False}
    text = (await http.post("/v1/completions", json=body)).text
    assert '"error"' in text
    total = await used(world, http)
    assert (total["requests"], total["prompt_tokens"], total["completion_tokens"]) == (1, 4, 2)


async def test_what_the_engine_refuses_is_not_counted(world: ApiWorld, http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/completions", json={**PROMPT, "max_tokens": 9999})).status_code == 400
    assert (await used(world, http))["requests"] == 0


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("start=yesterday", "start"),
        ("end=0001-01-01", "end"),
        ("start=2026-02-01&end=2026-01-01", "start"),
        ("format=xml", "format"),
    ],
)
async def test_bad_questions_about_usage(http: httpx.AsyncClient, query: str, param: str) -> None:
    response = await http.get(f"/v1/usage?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_without_the_store_limits_go_on_and_usage_waits(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the quota that was last known; what was used meanwhile is counted when the store is back, once."""
    await limit(admin, requests_per_minute=3)
    assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
    store, away = world.tenants, StoreUnavailable("away")
    calls = []

    async def fail(*args: Any) -> Any:
        calls.append(args)
        raise away

    with monkeypatch.context() as outage:
        outage.setattr(store, "admit", fail)
        outage.setattr(store, "settle", fail)
        codes = [(await http.post("/v1/completions", json=PROMPT)).status_code for _ in range(5)]
        assert codes == [200, 200, 429, 429, 429]  # it goes on from what was left
        assert len(calls) == 1  # it is left alone for a moment
        assert not await meter_of(world).flush()
        assert meter_of(world).unsettled == 3
    world.clock.advance(5)
    assert (await used(world, http))["requests"] == 3
    assert (await used(world, http))["requests"] == 3
    assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200


async def test_usage_that_waits_is_bounded_and_its_loss_is_said(
    world: ApiWorld, caplog: pytest.LogCaptureFixture
) -> None:
    meter = Meter(world.tenants, world.clock, max_unsettled=2)
    for i in range(3):
        meter.settle(await meter.admit(f"r{i}", "demo", BASE, 1), UsageCounts(requests=1))
    assert (meter.unsettled, meter.lost) == (2, 1)
    assert "r0" in caplog.text


async def test_the_weight_reaches_the_engine(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient
) -> None:
    await limit(admin, weight=2.5)
    await http.post("/v1/completions", json=PROMPT)
    assert world.engine.requests[-1].weight == 2.5


async def test_running_requests_are_counted_and_renewed_beside_the_rest(world: ApiWorld) -> None:
    """What the application runs beside its requests, for a moment."""
    async with world.client(ADMIN_KEY) as admin:
        await limit(admin)
    meter = meter_of(world)
    counting = asyncio.create_task(meter.keep_counting())
    async with world.client(await world.key()) as http:
        await http.post("/v1/completions", json=PROMPT)
        for _ in range(100):
            if not meter.unsettled:
                break
            await asyncio.sleep(0.01)
        assert (await http.get("/v1/usage")).json()["total"]["requests"] == 1
    counting.cancel()
    await asyncio.wait({counting})


async def test_a_store_that_is_back_is_asked_again_under_load(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that come twice a second must not keep putting off the next question."""
    await limit(admin, requests_per_minute=1000)
    asked = 0
    real = world.tenants.admit

    async def admit(*args: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise StoreUnavailable("away")
        return await real(*args)

    monkeypatch.setattr(world.tenants, "admit", admit)
    for _ in range(10):
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
        world.clock.advance(0.5)
    assert asked == 9  # all but those of the first second


async def test_leases_of_what_runs_are_renewed_and_of_what_cannot_run_any_more_are_not(
    world: ApiWorld, admin: httpx.AsyncClient
) -> None:
    await limit(admin, concurrent_requests=1)
    meter = Meter(world.tenants, world.clock, longest_s=300)
    await meter.admit("r1", "demo", BASE, 1)
    for _ in range(14):
        world.clock.advance(20)
        await meter.renew()
        with pytest.raises(QuotaExceeded):
            await meter.admit("r2", "demo", BASE, 1)
    for _ in range(5):
        world.clock.advance(20)
        await meter.renew()
    await meter.admit("r2", "demo", BASE, 1)


async def test_a_handler_that_is_cancelled_when_it_has_just_begun_gives_everything_back(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await limit(admin, concurrent_requests=1)

    async def started_and_cancelled(receive: Any, work: Any) -> None:
        await work
        raise asyncio.CancelledError

    with monkeypatch.context() as cancelling:
        cancelling.setattr("slipstream.api.calls.while_connected", started_and_cancelled)
        with pytest.raises(asyncio.CancelledError):
            await http.post("/v1/completions", json=PROMPT)
    assert world.engine.running == set()
    assert await meter_of(world).flush()
    assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200


async def test_without_the_store_tokens_are_corrected_as_well(
    world: ApiWorld, admin: httpx.AsyncClient, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a few requests' estimates would use up a quota that their answers did not."""
    await limit(admin, tokens_per_minute=200)
    assert (await http.post("/v1/completions", json={**PROMPT, "max_tokens": 100})).status_code == 200

    async def fail(*_: Any) -> Any:
        raise StoreUnavailable("away")

    monkeypatch.setattr(world.tenants, "admit", fail)
    codes = [(await http.post("/v1/completions", json={**PROMPT, "max_tokens": 100})).status_code for _ in range(5)]
    assert codes == [200] * 5
