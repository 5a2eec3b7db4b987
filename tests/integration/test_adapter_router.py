"""The router's and the policy's ends at Serve: what they read of it. The policies have unit tests; the whole is tested on a
cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.config import AutoscalingContext

from deployments import scaling_policy
from deployments.adapter_router import AdapterRouter, route_key, routing_stats
from deployments.scaling_policy import RequestRatePolicy, load_of, read_decisions
from slipstream.protocol import AdapterRef, ChatMessage, EngineStats, GenerateRequest, SamplingParams

DIGEST = "sha256:" + "ab" * 32
REQUEST = GenerateRequest("r", "acme", SamplingParams(), text="hello")


def test_replicas_report_residency_and_no_counters() -> None:
    others = {"sha256:" + "cd" * 32: "fetching", "sha256:" + "ef" * 32: "failed"}
    stats = EngineStats(5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, {DIGEST: "on_device", **others}, slots_free=0)
    assert routing_stats(stats) == {"adapters": {"ab" * 8: "device", "cd" * 8: "coming"}, "room": False}
    assert routing_stats(replace(stats, running=99, steps=100)) == routing_stats(stats)


def test_the_key_is_adapter_and_beginning() -> None:
    long = "once upon a time " * 100
    first = route_key(replace(REQUEST, text=long + "x", adapter=AdapterRef("acme", DIGEST)))
    assert first.adapter == "ab" * 8
    assert first == route_key(replace(REQUEST, text=long + "y", adapter=AdapterRef("acme", DIGEST)))
    assert first != route_key(replace(REQUEST, text=long + "x", tenant="other", adapter=AdapterRef("acme", DIGEST)))
    assert route_key(replace(REQUEST, text=long)).prefix is not None
    chat = replace(REQUEST, text=None, messages=(ChatMessage("system", long), ChatMessage("user", "a")))
    assert route_key(chat).prefix is not None
    tokens = replace(REQUEST, text=None, token_ids=tuple(range(900)))
    assert route_key(tokens) == route_key(replace(tokens, token_ids=(*range(900), 7)))
    assert route_key(REQUEST).prefix is None, "too short for a cache"


async def test_serve_can_make_the_router_and_tell_it_of_nobody() -> None:
    """The base class is Ray's own: this fails when its hooks change."""
    router: Any = AdapterRouter(
        deployment_id=DeploymentID("d", "a"),
        handle_source=DeploymentHandleSource.REPLICA,
        self_actor_id="x",
        self_actor_handle=None,
    )
    router.initialize_state(batch=8)
    router.update_replicas([])
    assert await router.choose_replicas([], None) == []


def context(**fields: Any) -> AutoscalingContext:
    known: dict[str, Any] = {
        "deployment_id": None, "deployment_name": "d", "app_name": "a", "current_num_replicas": 2, "target_num_replicas": 3,
        "running_replicas": [], "total_num_requests": 7.0, "total_queued_requests": 2.0, "aggregated_metrics": None,
        "raw_metrics": None, "capacity_adjusted_min_replicas": 0, "capacity_adjusted_max_replicas": 9, "policy_state": {},
        "last_scale_up_time": None, "last_scale_down_time": None, "current_time": None, "config": None,
    }  # fmt: skip
    return AutoscalingContext(**{**known, **fields})


def test_rates_add_up_over_replicas_and_waits_are_averaged() -> None:
    metrics = {
        "requests_per_s": {"a": 2.0, "b": 3.0},
        "tokens_per_s": {"a": 10.0, "b": 20.0},
        "queue_wait_s": {"a": 1.0, "b": 3.0},
        "slot_pressure": {"a": 0.5, "b": 1.0},
    }
    load = load_of(context(aggregated_metrics=metrics))
    assert (load.replicas, load.target, load.held, load.ongoing) == (2, 3, 2, 5)
    assert (load.requests_per_s, load.tokens_per_s) == (5.0, 30.0)
    assert (load.queue_wait_s, load.slot_pressure) == pytest.approx((2.0, 0.75))


def test_without_reports_there_is_no_load() -> None:
    load = load_of(context(total_queued_requests=0.0, total_num_requests=0.0))
    assert (load.requests_per_s, load.queue_wait_s, load.ongoing) == (0.0, 0.0, 0)


def test_decisions_are_counted_over_the_lives_of_controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, str] = {}
    monkeypatch.setattr(scaling_policy, "_internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr(
        scaling_policy, "_internal_kv_put", lambda key, page, overwrite, namespace: kept.update({key: page})
    )
    options = {"min_replicas": 1, "max_replicas": 4, "target_requests_per_s": 1.0, "up_delay_s": 0.0}
    busy = {"requests_per_s": {"a": 3.0}}
    for life in (1, 2):
        policy = RequestRatePolicy(**options)
        policy(context(current_num_replicas=1, target_num_replicas=1, aggregated_metrics=busy))
        policy._writer.shutdown(wait=True)
        found = read_decisions("a", "d")
        assert found.counts == {"up/rate": life}
        assert [(change.before, change.after) for change in found.changes] == [(1, 3)] * life
    assert read_decisions("a", "another").steady is None
