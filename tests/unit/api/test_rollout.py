"""Rollouts through HTTP: what a guard sees of requests, and copies that nobody notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from support.api_app import BASE, ApiWorld

from adapter_registry.errors import StoreUnavailable
from adapter_registry.records import PromptFormat
from adapter_registry.tenants import UsageCounts
from slipstream.api import rollout
from slipstream.api.caller import Caller
from slipstream.api.generation import Ending
from slipstream.api.runtime import Runtime
from slipstream.errors import AdapterUnavailable, Overloaded
from slipstream.protocol import GenerateEvent, GenerateRequest
from slipstream.testing import FakeEngine

ASK = {"model": "sql", "prompt": "one two three", "max_tokens": 4}


class Choosy(FakeEngine):
    """An engine on which some adapters fail."""

    raises: dict[str, Exception]

    def generate(self, request: GenerateRequest) -> AsyncGenerator[list[GenerateEvent], None]:
        """As the fake, unless the adapter is one of those."""
        error = self.raises.get(request.adapter.digest if request.adapter else "")
        return super().generate(request) if error is None else _failing(error)


async def _failing(error: Exception) -> AsyncGenerator[list[GenerateEvent], None]:
    for _ in range(1):
        raise error
    yield []


@pytest.fixture
def engine(world: ApiWorld) -> Choosy:
    world.engine = found = Choosy()
    found.raises = {}
    return found


@pytest.fixture
async def http(world: ApiWorld, engine: Choosy) -> Any:
    world.rebuild()
    async with world.client(await world.key()) as client:
        yield client


def runtime(world: ApiWorld) -> Runtime:
    found: Runtime = world.app.state.runtime
    return found


async def published(world: ApiWorld, count: int = 2) -> list[str]:
    return [(await world.publish("sql", content=str(i))).digest for i in range(count)]


async def put(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.put("/v1/adapters/sql/aliases/prod", json=body)


async def settle(world: ApiWorld) -> None:
    """Shadows have ended, and outcomes are told."""
    for _ in range(100):
        if not runtime(world).shadows._tasks:
            break
        await asyncio.sleep(0.01)
    await runtime(world).outcomes.tell()
    await runtime(world).meter.flush()


async def outcomes(http: httpx.AsyncClient) -> dict[int, dict[str, int]]:
    rows = (await http.get("/v1/adapters/sql/aliases")).json()["outcomes"]
    return {row["version"]: row for row in rows}


async def test_a_version_that_fails_is_rolled_back(world: ApiWorld, http: httpx.AsyncClient, engine: Choosy) -> None:
    _, second = await published(world)
    await put(http, version=1)
    guarded = await put(http, version=2, guard={"max_error_rate": 0.2, "min_requests": 5})
    assert guarded.json()["guard"]["window_s"] == 600
    engine.raises[second] = AdapterUnavailable("It overflows.")
    for _ in range(4):
        assert (await http.post("/v1/completions", json=ASK)).status_code == 503
    await settle(world)
    assert (await outcomes(http))[2]["errors"] == 4
    assert (await http.get("/v1/adapters/sql")).json()["aliases"] == {"prod": 2}
    await http.post("/v1/completions", json=ASK)
    await settle(world)
    adapter = (await http.get("/v1/adapters/sql")).json()
    assert (adapter["aliases"], adapter["guards"]) == ({"prod": 1}, {})
    assert (await http.post("/v1/completions", json=ASK)).json()["model"] == "sql@1"
    move = (await http.get("/v1/adapters/sql/aliases")).json()["data"][0]
    assert (move["by"], move["reason"]) == ("guard", "5 of 5 requests failed")


async def test_what_a_client_does_wrong_counts_for_nothing(
    world: ApiWorld, http: httpx.AsyncClient, engine: Choosy
) -> None:
    _, second = await published(world)
    await put(http, version=1, split={"version": 2, "weight": 0.9999}, guard={"max_error_rate": 0, "min_requests": 1})
    engine.raises[second] = Overloaded("Too much at once.")
    assert (await http.post("/v1/completions", json=ASK)).status_code == 429
    await settle(world)
    assert await outcomes(http) == {}
    del engine.raises[second]
    for stream in (False, True):
        assert (await http.post("/v1/completions", json={**ASK, "stream": stream})).status_code == 200
    await settle(world)
    found = (await outcomes(http))[2]
    assert (found["requests"], found["errors"]) == (2, 0)
    assert (await http.get("/v1/adapters/sql")).json()["splits"]["prod"]["version"] == 2


async def test_a_shadow_answers_unseen_and_is_compared(
    world: ApiWorld, http: httpx.AsyncClient, engine: Choosy
) -> None:
    first, second = await published(world)
    await put(http, version=1, split={"version": 2, "weight": 0.9999, "shadow": True})
    engine.enqueue("the same", "the same", "one text", "another text")
    for stream in (False, True):
        answer = await http.post("/v1/completions", json={**ASK, "stream": stream})
        assert answer.status_code == 200
        assert "sql@2" not in answer.text
        await settle(world)
    assert [request.adapter.digest for request in engine.requests if request.adapter] == [first, second] * 2
    seeds = [request.params.seed for request in engine.requests]
    assert seeds[0] == seeds[1]
    assert engine.requests[1].priority == rollout.SHADOW_PRIORITY
    found = await outcomes(http)
    assert (found[2]["requests"], found[2]["compared"], found[2]["same"]) == (2, 2, 1)
    assert found[1]["requests"] == 2
    models = {row["model"]: row["requests"] for row in (await http.get("/v1/usage")).json()["data"]}
    assert models == {"sql@1": 2, "sql@2 (shadow)": 2}


async def test_a_shadow_that_fails_harms_nobody_and_is_taken_away(
    world: ApiWorld, http: httpx.AsyncClient, engine: Choosy
) -> None:
    _, second = await published(world)
    shadow = {"version": 2, "weight": 0.9999, "shadow": True}
    await put(http, version=1, split=shadow, guard={"max_error_rate": 0.5, "min_requests": 3})
    engine.raises[second] = AdapterUnavailable("It overflows.")
    for _ in range(3):
        assert (await http.post("/v1/completions", json=ASK)).json()["model"] == "sql@1"
        await settle(world)
    assert (await http.get("/v1/adapters/sql")).json()["splits"] == {}


async def test_there_are_only_so_many_shadows_at_once(
    world: ApiWorld, http: httpx.AsyncClient, engine: Choosy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "MAX_SHADOWS", 0)
    await published(world)
    await put(http, version=1, split={"version": 2, "weight": 0.9999, "shadow": True})
    assert (await http.post("/v1/completions", json=ASK)).status_code == 200
    await settle(world)
    assert len(engine.requests) == 1


async def test_outcomes_wait_while_the_store_is_away(
    world: ApiWorld, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await published(world)
    await put(http, version=1, split={"version": 2, "weight": 0.0001})

    async def away(*_: object) -> str:
        raise StoreUnavailable("away")

    monkeypatch.setattr(world.store, "note_outcome", away)
    for _ in range(2):
        await http.post("/v1/completions", json=ASK)
        await settle(world)
    monkeypatch.undo()
    await settle(world)
    assert (await world.store.outcomes("demo", "sql"))["prod", 1].requests == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"version": 1, "guard": {}}, "guard"),
        ({"version": 1, "guard": {"max_error_rate": 1}}, "guard.max_error_rate"),
        ({"version": 1, "guard": {"min_acceptance": 0}}, "guard.min_acceptance"),
        ({"version": 1, "guard": {"max_error_rate": 0.1, "window_s": 1}}, "guard.window_s"),
        ({"version": 1, "split": {"version": 1, "weight": 0.5, "shadow": True}}, "split.version"),
        ({"version": 1, "split": {"version": 2, "weight": 0.5, "shadow": "yes"}}, "split.shadow"),
    ],
)
async def test_rollouts_that_are_refused(
    world: ApiWorld, http: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    await published(world)
    answer = await http.put("/v1/adapters/sql/aliases/prod", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert (await http.post("/v1/completions", json={**ASK, "model": BASE})).status_code == 200


async def test_a_client_that_leaves_counts_for_nothing(
    world: ApiWorld, http: httpx.AsyncClient, engine: Choosy
) -> None:
    await published(world)
    await put(http, version=1, split={"version": 2, "weight": 0.0001})
    caller = Caller("demo", "key", is_admin=False)
    target = await runtime(world).catalog.resolve(caller, "sql", split=True)
    for error, whole in ((None, False), (Overloaded("full"), False)):
        runtime(world).outcomes.note(target, Ending(UsageCounts(requests=1), error, whole))
    await settle(world)
    assert await outcomes(http) == {}
    runtime(world).outcomes.note(target, Ending(UsageCounts(requests=1), AdapterUnavailable("no"), whole=False))
    await settle(world)
    assert (await outcomes(http))[1]["errors"] == 1


async def test_a_version_is_judged_by_its_own_streams_not_by_what_was_copied(
    world: ApiWorld, http: httpx.AsyncClient, engine: Choosy
) -> None:
    await published(world)
    await put(http, version=1, split={"version": 2, "weight": 0.0001})
    target = await runtime(world).catalog.resolve(Caller("demo", "key", is_admin=False), "sql", split=True)
    verified = UsageCounts(requests=1, drafted_tokens=100, accepted_tokens=90)
    runtime(world).outcomes.note(target, Ending(verified, None, whole=True, judged_tokens=10, right_tokens=3))
    await settle(world)
    found = (await outcomes(http))[1]
    assert (found["drafted_tokens"], found["accepted_tokens"]) == (10, 3)


async def test_a_shadow_has_its_own_policy_and_is_nobody_else_s_bill(
    world: ApiWorld, http: httpx.AsyncClient, engine: Choosy
) -> None:
    await published(world)
    await http.put("/v1/adapters/sql/versions/1/speculation", json={"enabled": False})
    await put(http, version=1, split={"version": 2, "weight": 0.9999, "shadow": True})
    await http.post("/v1/completions", json=ASK)
    await settle(world)
    assert [request.speculation for request in engine.requests] == [False, None]
    await http.put("/v1/adapters/sql/access", json={"tenants": ["globex"]})
    async with world.client(await world.key("globex")) as other:
        assert (await other.post("/v1/completions", json={**ASK, "model": "demo/sql"})).status_code == 200
        await settle(world)
        assert len(engine.requests) == 3, "no copy of what another tenant asked"
        assert len((await other.get("/v1/usage")).json()["data"]) == 1


async def test_a_split_between_raw_and_chat_is_refused(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await world.publish("sql", content="a")
    await world.publish("sql", content="b", prompt_format=PromptFormat.RAW)
    answer = await put(http, version=1, split={"version": 2, "weight": 0.5})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "split.version")
