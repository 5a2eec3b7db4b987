"""The platform on a Ray cluster of three nodes, whose parts die under load: every request of the openai client is counted."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial

import openai
import pytest
import pytest_asyncio
from support.load import UNHARMED, Load, Question, questions
from support.metrics_page import Series, families, is_counter, of, queries_without_data, scrape
from support.processes import eventually
from support.prometheus import needs_prometheus, running_prometheus
from support.ray_cluster import ADMIN_KEY, EDGE, METRICS_KEY, WORKER, Platform, kill, platform
from support.tiny_model import save_tiny_model
from typer.testing import CliRunner

from deployments.drain_node import drain, serving
from slipstream.cli.app import app
from slipstream.metrics.catalogue import SPECS

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.timeout(600)]
WIDE, SPLIT = "wide", "split"  # two base models: one with two replicas, one whose replica is two ranks


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[Platform]:
    """Two base models, with adapters, on two worker nodes; two gateways on the head."""
    with platform() as found:
        found.run(found.settings(models=models(found), gateway_replicas=2, **EDGE))
        for name, hidden in ((WIDE, 32), (SPLIT, 64)):
            model = save_tiny_model(found.folder / f"same-{name}", hidden=hidden)
            found.publish(name, model)
        yield found


def models(world: Platform, **wide: object) -> list[dict[str, object]]:
    split = world.model(SPLIT, 64, tensor_parallel_size=2)
    return [world.model(WIDE, 32, **{"min_replicas": 2, **wide}), split]


@pytest_asyncio.fixture
async def load(world: Platform) -> AsyncIterator[Load]:
    """Questions to both bases and all adapters, with the answers of a cluster that nothing had happened to yet."""
    async with world.client() as client:
        found = Load(client, questions([WIDE, SPLIT, *world.adapters]))
        if not world.answers:
            await found.learn()
            world.answers = found.expected
        found.expected = world.answers
        yield found


def scraped(world: Platform) -> dict[Series, float]:
    return scrape(world.url, METRICS_KEY)


def scraped_when(world: Platform, up: dict[tuple[str, str], int]) -> dict[Series, float]:
    """The first page on which so many replicas of each role and model answer: on a busy machine one may be late."""
    deadline = time.monotonic() + 30
    while True:
        page = scraped(world)
        found = Counter(
            (labels["role"], labels["model"]) for labels, value in of(page, "slipstream_replica_up") if value
        )
        if found == up:
            return page
        assert time.monotonic() < deadline, found


def test_both_base_models_are_listed_and_shown(world: Platform) -> None:
    listed = {model["id"] for model in world.admin("/v1/models", tenant="acme")["data"]}
    assert {WIDE, SPLIT, *world.adapters} <= listed
    assert len(world.replicas(WIDE)) == 2
    (split,) = world.replicas(SPLIT)
    assert [rank["rank"] for rank in split["ranks"]] == [0, 1]
    assert len({rank["pid"] for rank in split["ranks"]}) == 2


async def test_requests_go_where_their_adapter_is(world: Platform) -> None:
    """With two idle replicas and no router of our own each adapter would soon be on both."""
    wide = [name for name in world.adapters if name.startswith(WIDE)]
    async with world.client() as client:
        for name in wide * 8:
            await client.completions.create(model=name, prompt="where?", max_tokens=2)
        several = await client.completions.create(model=wide[0], prompt=["one", "two", "three"], max_tokens=2)
    assert len(several.choices) == 3, "several calls under one request: a router without order would lose all but one"
    held = Counter(digest for replica in world.replicas(WIDE) for digest in replica["adapters"])
    assert len(held) == len(wide)
    assert set(held.values()) == {1}


async def test_any_gateway_counts_for_all_processes(world: Platform, load: Load) -> None:
    """Scrapes go to either gateway; no counter is smaller at the next one."""
    async with load.going():
        await load.grows(10)
        pages = [await asyncio.to_thread(scraped, world) for _ in range(20)]
    seen: dict[Series, float] = {}
    for page in pages:
        counters = {series: value for series, value in page.items() if is_counter(series)}
        assert [series for series, value in counters.items() if value < seen.get(series, 0)] == []
        seen |= counters
    last = await asyncio.to_thread(scraped_when, world, {("gateway", ""): 2, ("engine", WIDE): 2, ("engine", SPLIT): 1})
    asked = {
        labels["replica"] for labels, _ in of(last, "slipstream_http_requests_total") if labels["route"] == "/metrics"
    }
    assert len(asked) == 2, "both gateways were asked"
    ranks = {(labels["model"], value) for labels, value in of(last, "slipstream_engine_ranks_up")}
    assert ranks == {(WIDE, 1), (SPLIT, 2)}
    assert sum(value for _, value in of(last, "slipstream_adapter_drafts_judged_total")) > 0


async def test_a_replica_that_hangs_is_down_and_hides_no_other(world: Platform, load: Load) -> None:
    stuck, other = world.replicas(WIDE)
    os.kill(stuck["ranks"][0]["pid"], signal.SIGSTOP)
    try:
        rest = {("gateway", ""): 2, ("engine", WIDE): 1, ("engine", SPLIT): 1}
        page = await asyncio.to_thread(scraped_when, world, rest)
    finally:
        os.kill(stuck["ranks"][0]["pid"], signal.SIGCONT)
    up = {labels["replica"]: value for labels, value in of(page, "slipstream_replica_up")}
    assert (up[stuck["replica"]], up[other["replica"]]) == (0, 1)
    steps = {labels["replica"] for labels, _ in of(page, "slipstream_engine_steps_total")}
    assert stuck["replica"] not in steps
    assert other["replica"] in steps
    world.wait_for(WIDE, 2)


@needs_prometheus
async def test_prometheus_has_data_for_every_dashboard(world: Platform, load: Load) -> None:
    quota = {"tokens_per_month": 10**9, "tokens_per_minute": 10**8, "requests_per_minute": 10**6}
    world.admin("/v1/tenants/acme", "PUT", json={"quota": quota})
    world.admin("/v1/tenants/tiny", "PUT", json={"quota": {"requests_per_minute": 1}})
    target = {"job_name": "slipstream", "authorization": {"credentials": METRICS_KEY}}
    with running_prometheus({**target, "static_configs": [{"targets": [f"127.0.0.1:{world.port}"]}]}) as prometheus:
        assert await asyncio.to_thread(eventually, lambda: bool(prometheus.query("slipstream_replica_up")))
        async with load.going():
            model = await asyncio.to_thread(save_tiny_model, world.folder / "same-fresh", hidden=32)
            await asyncio.to_thread(world.publish_one, WIDE, model, "fresh", 9)
            await load.ask(Question("fresh", "what is new?", stream=True, temperature=0, seed=1))
            async with world.client(tenant="tiny") as tiny:
                await tiny.completions.create(model=WIDE, prompt="me too", max_tokens=2)
                with pytest.raises(openai.RateLimitError):
                    await tiny.completions.create(model=WIDE, prompt="me too", max_tokens=2)
            await load.grows(40)
        assert await asyncio.to_thread(eventually, lambda: not queries_without_data(prometheus)), queries_without_data(
            prometheus
        )
        evaluated = {"ok"}
        assert await asyncio.to_thread(eventually, lambda: {rule["health"] for rule in prometheus.rules()} == evaluated)
        assert [rule["name"] for rule in prometheus.rules() if rule.get("state") == "firing"] == []
        assert prometheus.value("slipstream:call_errors:ratio_rate5m") == 0
        exposed = {each for each in prometheus.get("label/__name__/values") if each.startswith("slipstream_")}
    assert families(exposed) == {spec.name for spec in SPECS}


async def test_an_engine_replica_dies(world: Platform, load: Load) -> None:
    """And the trace shows which requests went on elsewhere, and why."""
    before = await world.used_at_rest()
    trace_id = secrets.token_hex(16)
    load.client = load.client.with_options(default_headers={"traceparent": f"00-{trace_id}-{'1' * 16}-01"})
    async with load.going():
        await load.grows(20)
        for _ in range(5):  # answers are short: a replica may have none under way
            for replica in world.replicas(WIDE):
                kill(replica["ranks"][0]["pid"])
                await load.grows(30)
            await asyncio.to_thread(world.wait_for, WIDE, 2)
            if await asyncio.to_thread(eventually, partial(_tried_again, world, trace_id), 8.0):
                break
    assert load.verdict() == UNHARMED
    assert await world.counted(before, load.answered, load.tokens), "every answer once, whoever gave its parts"
    await asyncio.to_thread(_check_later_tries, world, trace_id)


def _tried_again(world: Platform, trace_id: str) -> bool:
    """Whether some request went on elsewhere, and its new replica told so."""
    spans = world.collector.trace(trace_id)
    again = {span.span_id for span in spans if span.name == "route" and span.attributes["slipstream.try"] > 1}
    return bool(again & {span.parent_id for span in spans if span.name == "replica"})


def _check_later_tries(world: Platform, trace_id: str) -> None:
    """Each is a span beside the try that failed before it, with its replica's and its engine's spans beneath it. (Not of one
    whose replica was killed in turn, before it had sent its spans: then it is the third that tells.)"""
    assert eventually(partial(_tried_again, world, trace_id))
    spans = world.collector.trace(trace_id)
    routes = [span for span in spans if span.name == "route"]
    replicas = {span.parent_id: span for span in spans if span.name == "replica"}
    for again in (each for each in routes if each.attributes["slipstream.try"] > 1 and each.span_id in replicas):
        assert again.attributes["slipstream.retry.reason"] in {
            "ActorDiedError",
            "EngineFailed",
            "ActorUnavailableError",
        }
        same = {"parent_id": again.parent_id, "call": again.attributes["slipstream.call_id"]}
        (before,) = [
            span
            for span in routes
            if span.attributes["slipstream.try"] == again.attributes["slipstream.try"] - 1
            and {"parent_id": span.parent_id, "call": span.attributes["slipstream.call_id"]} == same
        ]
        assert before.failed
        assert before.attributes["error.type"] == "ReplicaLost"
        assert before.end_ns <= again.start_ns
        assert any(span.parent_id == replicas[again.span_id].span_id for span in spans if span.name == "engine")


async def test_a_rank_dies_and_its_group_with_it(world: Platform, load: Load) -> None:
    (before,) = world.replicas(SPLIT)
    async with load.going():
        await load.grows(20)
        kill(before["ranks"][1]["pid"])
        await load.grows(60)
    assert load.verdict() == UNHARMED
    world.wait_for(SPLIT, 1)
    (after,) = world.replicas(SPLIT)
    assert not {rank["pid"] for rank in before["ranks"]} & {rank["pid"] for rank in after["ranks"]}


async def test_serves_controller_dies(world: Platform, load: Load) -> None:
    async with load.going():
        await load.grows(20)
        (controller,) = world.actor_pids("ServeController")
        kill(controller)
        await load.grows(60)
    assert load.verdict() == UNHARMED
    world.wait_for(WIDE, 2)


async def test_redis_goes_away_and_comes_back(world: Platform, load: Load) -> None:
    """Quotas go on from what was last known of them, and usage waits for it."""
    world.admin("/v1/tenants/acme", "PUT", json={"quota": {"requests_per_minute": 10**6}})
    before = await world.used_at_rest()
    async with load.going():
        await load.grows(40)
        world.redis.stop(kill=True)
        await load.grows(60)
        world.redis.start()
        await load.grows(40)
    assert load.verdict() == UNHARMED
    assert await world.counted(before, load.answered, load.tokens)


async def test_rays_control_store_dies_and_comes_back(world: Platform, load: Load) -> None:
    async with load.going():
        await load.grows(20)
        await asyncio.to_thread(world.kill_gcs, 4.0)
        await load.grows(60)
    assert load.verdict() == UNHARMED


async def test_a_worker_node_goes_away(world: Platform, load: Load) -> None:
    async with load.going():
        await load.grows(20)
        await asyncio.to_thread(world.cluster.remove_node, world.nodes.pop(), allow_graceful=False)
        await load.grows(60)
        world.nodes.append(await asyncio.to_thread(world.cluster.add_node, **WORKER))
        await load.grows(20)
    assert load.verdict() == UNHARMED
    world.wait_for(WIDE, 2)
    world.wait_for(SPLIT, 1)


async def test_a_node_is_drained_before_it_goes(world: Platform, load: Load) -> None:
    """As a pod does that Kubernetes is about to stop: what ran there runs elsewhere first."""
    found = [node for node in world.nodes if await asyncio.to_thread(serving, node.node_id)]
    assert found, "replicas run on one of them, or on both"
    node = found[-1]
    node_id = node.node_id
    async with load.going():
        await load.grows(20)
        assert await asyncio.to_thread(drain, node_id, 120)
        assert await asyncio.to_thread(serving, node_id) == []
        await load.grows(20)
        world.nodes.remove(node)
        await asyncio.to_thread(world.cluster.remove_node, node, allow_graceful=False)
        world.nodes.append(await asyncio.to_thread(world.cluster.add_node, **WORKER))
        await load.grows(20)
    assert load.verdict() == UNHARMED
    world.wait_for(WIDE, 2)
    world.wait_for(SPLIT, 1)


async def test_a_rolling_update_loses_nothing(world: Platform, load: Load) -> None:
    """New code replaces every engine and every gateway, each of which is told to stop with requests on it."""
    pids = {replica["ranks"][0]["pid"] for replica in world.replicas(WIDE)}
    async with load.going():
        await load.grows(20)
        updated = world.settings(models=models(world, max_waiting=100), gateway_replicas=2, **EDGE)
        await asyncio.to_thread(world.run, updated)
        await asyncio.to_thread(world.wait_for, WIDE, 2)
        await load.grows(20)
    assert load.verdict() == UNHARMED
    assert not pids & {replica["ranks"][0]["pid"] for replica in world.replicas(WIDE)}


async def test_a_gateway_dies(world: Platform, load: Load) -> None:
    """Its requests are the client's to send again; a stream ends with a broken connection, and never with a wrong text."""
    async with world.client(retries=4) as patient:
        load.client = patient
        async with load.going():
            await load.grows(20)
            for pid in world.actor_pids("ServeReplica:slipstream:Gateway")[:1]:
                kill(pid)
            await load.grows(60)
    assert (load.lost, load.wrong) == ([], [])
    assert load.broken <= 8, "only what that gateway had open"


def test_the_status_command_shows_it(world: Platform) -> None:
    done = CliRunner().invoke(app, ["status", "--url", world.url, "--api-key", ADMIN_KEY], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert f"{SPLIT}: 1 running (of 1, 2 ranks each)" in done.output
    for rank in world.replicas(SPLIT)[0]["ranks"]:
        assert str(rank["pid"]) in done.output


async def test_replicas_follow_the_load_to_two_and_to_none_and_back(world: Platform, load: Load) -> None:
    quick = {"scale_up_delay_s": 0.5, "scale_down_delay_s": 3, "scale_to_zero_delay_s": 3, "scale_cool_down_s": 1}
    wide = world.model(WIDE, 32, min_replicas=0, max_replicas=2, target_requests_per_s=1, **quick)
    await asyncio.to_thread(world.run, world.settings(models=[wide], gateway_replicas=1, **EDGE))
    load.questions = [question for question in load.questions if question.model.startswith(WIDE)]
    async with load.going():
        await asyncio.to_thread(world.wait_for, WIDE, 2)
    await asyncio.to_thread(world.wait_for, WIDE, 0)
    assert world.ready(), "asleep is ready"
    async with world.client() as client:
        woken = await client.completions.create(model=WIDE, prompt="wake up", max_tokens=3, temperature=0)
    assert woken.usage is not None
    assert woken.usage.completion_tokens > 0
    assert load.verdict() == UNHARMED
    changes = [(change["before"], change["after"]) for change in world.view(WIDE)["scaling_changes"]]
    assert (1, 2) in changes
    assert (1, 0) in changes
    reasons = [change["reason"] for change in world.view(WIDE)["scaling_changes"]]
    assert any("requests/s at 1 a replica" in reason for reason in reasons)
    assert any("no request for 3 s" in reason for reason in reasons)
