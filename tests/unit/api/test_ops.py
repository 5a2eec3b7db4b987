"""Health, readiness, metrics, request ids."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from support.api_app import BASE, ApiWorld

from adapter_registry.errors import StoreUnavailable
from adapter_registry.keys import hash_key
from slipstream.cluster.view import total
from slipstream.errors import EngineFailed, Unavailable
from slipstream.protocol import EngineStats
from slipstream.testing import FakeEngine


async def test_ready_when_everything_answers(http: httpx.AsyncClient) -> None:
    response = await http.get("/readyz")
    assert response.json() == {"status": "ready", "missing": []}


async def test_not_ready_says_what_is_missing(world: ApiWorld, http: httpx.AsyncClient) -> None:
    world.store.outage = StoreUnavailable("away")
    world.engine.outage = Unavailable("starting")
    response = await http.get("/readyz")
    assert response.status_code == 503
    assert response.json()["missing"] == ["registry", BASE]
    assert (await http.get("/healthz")).status_code == 200


async def test_not_ready_does_not_wait_for_ever(world: ApiWorld) -> None:
    class Stuck(type(world.engine)):  # type: ignore[misc]
        async def stats(self) -> None:
            await asyncio.Event().wait()

    world.engine = Stuck()
    world.rebuild(probe_timeout_s=0.02)
    async with world.client(None) as client:
        assert (await client.get("/readyz")).json()["missing"] == [BASE]


async def test_a_model_that_sleeps_is_ready_and_is_not_woken(world: ApiWorld) -> None:
    class Asleep(type(world.engine)):  # type: ignore[misc]
        async def stats(self) -> EngineStats:
            return total([])

        async def describe(self) -> None:
            raise AssertionError("woken")

    world.engine = Asleep()
    world.rebuild()
    async with world.client(None) as client:
        assert (await client.get("/readyz")).json() == {"status": "ready", "missing": []}
        assert (await client.get("/metrics")).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/nowhere"])
async def test_every_response_has_a_request_id(world: ApiWorld, path: str) -> None:
    async with world.client(None) as client:
        ids = {(await client.get(path)).headers["x-request-id"] for _ in range(3)}
        assert len(ids) == 3
        assert (await client.get(path, headers={"x-request-id": "abc-123"})).headers["x-request-id"] == "abc-123"
        for insane in (b"x" * 129, b"two words", b"\xff", b""):
            headers = {"x-request-id": insane}
            assert (await client.get(path, headers=headers)).headers["x-request-id"].startswith("req-")  # type: ignore[arg-type]


async def test_two_requests_with_one_id_stay_apart(world: ApiWorld, http: httpx.AsyncClient) -> None:
    headers = {"x-request-id": "same"}
    body = {"model": BASE, "prompt": "x"}
    await asyncio.gather(*(http.post("/v1/completions", json=body, headers=headers) for _ in range(2)))
    first, second = (request.request_id for request in world.engine.requests)
    assert first != second


async def test_a_dead_step_loop_is_not_ready(world: ApiWorld) -> None:
    class Dead(FakeEngine):
        async def stats(self) -> EngineStats:
            raise EngineFailed("the step loop died")

    world.engine = Dead()
    world.rebuild(engines={BASE: world.engine})
    async with world.client(None) as client:
        response = await client.get("/readyz")
    assert (response.status_code, response.json()["missing"]) == (503, [BASE])


async def test_probes_may_ask_for_the_head_only(world: ApiWorld) -> None:
    async with world.client(None) as client:
        for path in ("/healthz", "/readyz"):
            head, get = await client.head(path), await client.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == get.headers["content-length"]
        world.store.outage = StoreUnavailable("away")
        assert (await client.head("/readyz")).status_code == 503


async def test_blobs_are_swept_while_the_application_lives(world: ApiWorld) -> None:
    await world.publish("sql", content="a")
    sha = hash_key("a")
    world.blobs.content["demo", sha] = b"a"
    await world.store.delete("demo", "sql")
    world.store.outage = StoreUnavailable("away")
    world.rebuild(sweep_every_s=0.01, sweep_grace_s=0)
    before = asyncio.all_tasks()
    async with world.app.router.lifespan_context(world.app):
        await asyncio.sleep(0.05)
        assert await world.blobs.exists("demo", sha)
        world.store.outage = None
        async with asyncio.timeout(10):
            while await world.blobs.exists("demo", sha):
                await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before
