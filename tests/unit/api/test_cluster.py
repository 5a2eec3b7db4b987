"""/v1/cluster and what `slipstream status` makes of it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from support.api_app import ADMIN_KEY, ApiWorld
from typer.testing import CliRunner

from slipstream.cli.app import app
from slipstream.cluster.view import ModelView, RankReport, ReplicaReport, ScalingHistory, ScalingRecord, total
from slipstream.errors import Unavailable
from slipstream.protocol import EngineStats
from slipstream.testing import FakeCluster

DIGEST = "sha256:" + "a" * 64
STATS = EngineStats(
    running=2, waiting=1, kv_blocks_total=10, kv_blocks_free=5, steps=7, prompt_tokens=1, completion_tokens=20,
    drafted_tokens=10, accepted_tokens=6, preemptions=0, prefix_hit_tokens=0, adapters={DIGEST: "on_device"},
    queue_wait_s=0.5, adapter_slots=4, slots_free=3,
)  # fmt: skip
VIEW = ModelView(
    model="base",
    min_replicas=0,
    max_replicas=4,
    tensor_parallel_size=2,
    states={"RUNNING": 1, "STARTING": 1},
    replicas=(ReplicaReport("abc", (RankReport(0, "10.0.0.1", 11), RankReport(1, "10.0.0.2", 12)), 61.0, STATS),),
    scaling=ScalingHistory(
        ScalingRecord(100.0, 2, 2, "steady: 3.00 requests/s at 2 a replica"),
        (ScalingRecord(90.0, 1, 2, "3.00 requests/s at 2 a replica"),),
        {"up/rate": 1},
    ),
)
ASLEEP = ModelView("small", 0, 1, 1)


@pytest.fixture
def world(tmp_path: Path) -> ApiWorld:
    return ApiWorld(tmp_path, cluster=FakeCluster(VIEW, ASLEEP))


async def test_the_admin_sees_replicas_ranks_and_reasons(world: ApiWorld) -> None:
    async with world.client(ADMIN_KEY) as client:
        answer = await client.get("/v1/cluster")
    shown, asleep = answer.json()["models"]
    (replica,) = shown["replicas"]
    assert [rank["pid"] for rank in replica["ranks"]] == [11, 12]
    assert (replica["waiting"], replica["acceptance"], replica["adapters"]) == (1, 0.6, {DIGEST: "on_device"})
    assert shown["states"] == {"RUNNING": 1, "STARTING": 1}
    assert shown["scaling_changes"][0]["after"] == 2
    assert (asleep["replicas"], asleep["scaling"]) == ([], None)


async def test_tenants_do_not(world: ApiWorld) -> None:
    async with world.client(await world.key()) as client:
        assert (await client.get("/v1/cluster")).status_code == httpx.codes.FORBIDDEN


async def test_without_a_controller_it_says_so(world: ApiWorld) -> None:
    world.cluster.outage = Unavailable("Serve's controller does not answer.")
    async with world.client(ADMIN_KEY) as client:
        assert (await client.get("/v1/cluster")).status_code == httpx.codes.SERVICE_UNAVAILABLE


def test_status_shows_it_to_people(world: ApiWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    transport = httpx.ASGITransport(world.app)
    done = CliRunner().invoke(app, ["status", "--api-key", ADMIN_KEY], obj=transport)
    assert done.exit_code == 0, done.output
    for part in ("base: 1 running, 1 starting (of 0 to 4, 2 ranks each)", "abc", "60%", "10.0.0.2:12", "1 → 2"):
        assert part in done.output
    assert "small: asleep" in done.output


def test_counters_of_replicas_add_up() -> None:
    busy = total([STATS, STATS])
    assert (busy.running, busy.completion_tokens, busy.queue_wait_s, busy.replicas) == (4, 40, 0.5, 2)
    assert total([]).replicas == 0
