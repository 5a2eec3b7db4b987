"""One page out of many: each family once, each process's samples its own; names for those who may see them."""

from __future__ import annotations

import pickle

from prometheus_client import CollectorRegistry
from support.metrics_page import of, parse, total

from slipstream.cluster.view import ModelView, ScalingHistory, ScalingRecord
from slipstream.metrics.catalogue import SPECS, counter
from slipstream.metrics.cluster import cluster_families
from slipstream.metrics.gateway import Called, GatewayMetrics, Outcome, Surroundings
from slipstream.metrics.pages import Page, Process, page_of, render
from slipstream.testing import ManualClock

ONE, TWO = Process("one"), Process("two")


def gateway(process: Process, calls: int) -> Page:
    metrics = GatewayMetrics(ManualClock(0.0))
    called = Called("base", "acme")
    for _ in range(calls):
        metrics.begun(called, None)
        metrics.ended(called, Outcome.OK, 3, 4)
    return metrics.page(process, Surroundings(quotas=[("acme", "tokens_per_minute", 0.5)]))


def test_each_process_keeps_its_own_samples() -> None:
    page = parse(render([gateway(ONE, 2), gateway(TWO, 5)], [Process("three", "base")], (), names=True).decode())
    calls = {labels["replica"]: value for labels, value in of(page, "slipstream_tenant_requests_total")}
    assert calls == {"one": 2, "two": 5}
    up = {(labels["role"], labels["replica"]): value for labels, value in of(page, "slipstream_replica_up")}
    assert up == {("gateway", "one"): 1, ("gateway", "two"): 1, ("engine", "three"): 0}
    assert total(page, "slipstream_tenant_tokens_total", kind="completion") == 28


def test_a_page_travels() -> None:
    page = gateway(ONE, 2)
    assert render([pickle.loads(pickle.dumps(page))], (), (), names=True) == render([page], (), (), names=True)


def test_without_a_key_nobody_is_named() -> None:
    text = render([gateway(ONE, 2)], (), (), names=False).decode()
    assert "acme" not in text
    for spec in SPECS:
        if spec.private:
            assert spec.name not in text
    assert total(parse(text), "slipstream_requests_total", outcome="ok") == 2


def test_when_counters_began_is_left_out() -> None:
    registry = CollectorRegistry()
    counter("registry_errors_total", registry).inc()
    text = render([page_of(ONE, registry)], (), (), names=True).decode()
    assert "_created" not in text
    assert 'slipstream_registry_errors_total{replica="one"} 1.0' in text


def test_replicas_and_decisions_are_the_clusters() -> None:
    steady = ScalingRecord(1.0, 2, 3, "steady")
    views = [
        ModelView("a", 1, 4, 1, {"RUNNING": 2, "STARTING": 1}, (), ScalingHistory(steady, (), {"up/rate": 7})),
        ModelView("b", 1, 1, 1),
    ]
    page = parse(render([], (), cluster_families(views), names=True).decode())
    assert total(page, "slipstream_replicas", model="a", state="running") == 2
    assert total(page, "slipstream_replicas", model="b", state="running") == 0
    assert total(page, "slipstream_replicas_desired", model="a") == 3
    assert total(page, "slipstream_replicas_desired", model="b") == 1
    assert total(page, "slipstream_scaling_decisions_total", direction="up", cause="rate") == 7
    assert total(page, "slipstream_scaling_decisions_total") == 7
