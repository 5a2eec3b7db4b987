"""A gateway asks all others: who hangs or fails is missed and hides nobody, who has ended is not missed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError

from deployments import metrics_peers, serve_states
from deployments.metrics_peers import RayPeers, ask_all
from deployments.serve_states import ServedModel
from slipstream.errors import Unavailable
from slipstream.metrics.pages import Gathered, Page, Process

OWN = Process("gw-own")
ENGINES = [Process(f"e{number}", "base") for number in range(3)]
TIMEOUT_S = 0.2


class Replica:
    """What one replica answers: a page, an error, or nothing."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def get_async(self) -> Any:
        if self.answer is ...:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Handle:
    """A deployment's handle, with what its replicas answer."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers

    def broadcast(self, method: str) -> Any:
        assert method == "metrics"

        async def asked() -> list[Replica]:
            if not self.answers:
                raise DeploymentUnavailableError(None)
            return [Replica(answer) for answer in self.answers]

        return SimpleNamespace(_fetch_replica_results_async=asked)


def pages(*processes: Process) -> list[Page]:
    return [Page(process, ()) for process in processes]


class World:
    """A gateway among others; `states` is what Serve says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        context = SimpleNamespace(
            app_name="app", deployment="Gateway", replica_id=SimpleNamespace(unique_id=OWN.replica)
        )
        self.gateways, self.engines = Handle(*pages(OWN)), Handle(*pages(*ENGINES))
        self.states: Mapping[str, Mapping[str, int]] | None = {"Gateway": {"RUNNING": 1}, "E": {"RUNNING": 3}}
        monkeypatch.setattr(serve, "get_replica_context", lambda: context)
        monkeypatch.setattr(serve, "get_deployment_handle", lambda name, app: self.gateways)
        monkeypatch.setattr(metrics_peers, "replica_states", self._replica_states)
        self.peers = RayPeers({"base": ServedModel("E", 1, 3, 1)}, {"base": SimpleNamespace(broadcast=self._broadcast)})

    def _broadcast(self, method: str) -> Any:
        return self.engines.broadcast(method)

    async def _replica_states(self, app: str) -> Mapping[str, Mapping[str, int]]:
        if self.states is None:
            raise Unavailable("the controller is away")
        return self.states

    async def gather(self) -> Gathered:
        return await self.peers.gather(TIMEOUT_S)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_all_others_answer(world: World) -> None:
    found = await world.gather()
    assert {page.process for page in found.pages} == set(ENGINES), "its own page it has already"
    assert found.silent == []


@pytest.mark.parametrize("answer", [..., RuntimeError("broken"), "no page"])
async def test_who_hangs_or_fails_is_missed_and_hides_nobody(world: World, answer: Any) -> None:
    await world.gather()
    world.engines = Handle(answer, *pages(*ENGINES[1:]))
    found = await world.gather()
    assert {page.process for page in found.pages} == set(ENGINES[1:])
    assert found.silent == [ENGINES[0]]


async def test_who_has_ended_is_not_missed(world: World) -> None:
    await world.gather()
    world.engines, world.states = Handle(*pages(*ENGINES[1:])), {"Gateway": {"RUNNING": 1}, "E": {"RUNNING": 2}}
    assert (await world.gather()).silent == []
    world.engines, world.states = Handle(), {"Gateway": {"RUNNING": 1}}
    assert await world.gather() == Gathered([], []), "asleep"


async def test_one_that_never_said_anything_has_no_name(world: World) -> None:
    world.engines = Handle(..., ..., *pages(ENGINES[2]))
    found = await world.gather()
    assert found.silent == [Process("unknown", "base")]


async def test_without_a_controller_nobody_is_missed(world: World) -> None:
    await world.gather()
    world.engines, world.states = Handle(*pages(ENGINES[0])), None
    found = await world.gather()
    assert ([page.process for page in found.pages], found.silent) == ([ENGINES[0]], [])


async def test_a_gateway_that_is_gone_is_missed_by_the_others(world: World) -> None:
    other = Process("gw-other")
    world.gateways, world.states = Handle(*pages(OWN, other)), {"Gateway": {"RUNNING": 2}, "E": {"RUNNING": 3}}
    assert other in {page.process for page in (await world.gather()).pages}
    world.peers._gateways = Handle(*pages(OWN), ...)
    assert (await world.gather()).silent == [other]


async def test_a_deployment_that_cannot_be_asked_is_no_error() -> None:
    assert await ask_all(Handle(), "metrics", TIMEOUT_S) == []


async def test_a_dead_controller_holds_one_thread_and_not_one_for_each_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = threading.Event(), []

    def status() -> Any:
        asked.append(1)
        answer.wait(30)
        return SimpleNamespace(applications={})

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serve_states, "_TIMEOUT_S", 0.05)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await serve_states.replica_states("app")
    assert len(asked) == 1
    monkeypatch.setattr(serve_states, "_TIMEOUT_S", 30.0)
    waiting = asyncio.ensure_future(serve_states.replica_states("app"))
    answer.set()
    assert await waiting == {}
    assert await serve_states.replica_states("app") == {}
    assert len(asked) == 2
