"""/metrics of one application: what calls, uploads and outages leave there, and who may see names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_app import ADMIN_KEY, BASE, ApiWorld, form_files, write_adapter
from support.metrics_page import Series, families, of, parse, total

from adapter_registry.errors import StoreUnavailable
from adapter_registry.keys import hash_key
from adapter_registry.limits import Quota
from adapter_registry.records import utc_now
from adapter_registry.tenants import Settlement, TenantRecord, UsageCounts
from slipstream.errors import EngineFailed, Overloaded, Unavailable
from slipstream.metrics.catalogue import SPECS, Source
from slipstream.metrics.gateway import Surroundings
from slipstream.metrics.pages import Process
from slipstream.testing import FakeAnswer

METRICS_KEY = "a-metrics-key-of-a-test"


async def page_of(world: ApiWorld, key: str | None = ADMIN_KEY) -> dict[Series, float]:
    async with world.client(key) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return parse(answer.text)


async def complete(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"model": BASE, "prompt": "a b c", "max_tokens": 5, **fields})


async def test_requests_and_tokens(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await complete(http, stream=True)
    await http.post("/v1/completions", json={"model": BASE})
    await http.get("/v1/adapters/some-name-nobody-has")
    await http.get("/nothing/here")
    await http.request("BREW", "/healthz")
    page = await page_of(world)
    http_requests = {
        (labels["route"], labels["method"], labels["status"]): value
        for labels, value in of(page, "slipstream_http_requests_total")
    }
    assert http_requests == {
        ("/v1/completions", "POST", "200"): 1,
        ("/v1/completions", "POST", "400"): 1,
        ("/v1/adapters/{name}", "GET", "404"): 1,
        ("unmatched", "GET", "404"): 1,
        ("/healthz", "OTHER", "405"): 1,
    }
    for kind, count in (("prompt", 3), ("completion", 5), ("drafted", 2), ("accepted", 2)):
        assert total(page, f"slipstream_{kind}_tokens_total", model=BASE) == count
    assert total(page, "slipstream_engine_steps_total", model=BASE) == 3
    assert total(page, "slipstream_time_to_first_token_seconds_count", model=BASE) == 1
    assert total(page, "slipstream_time_per_output_token_seconds_count", model=BASE) == 1
    assert total(page, "slipstream_requests_total", model=BASE, outcome="ok") == 1
    assert total(page, "slipstream_replica_up", role="engine", model=BASE) == 1


async def test_every_metric_of_a_gateway_and_the_cluster_has_a_place(world: ApiWorld, http: httpx.AsyncClient) -> None:
    version = await world.publish("sql")
    await world.tenants.put_tenant(
        TenantRecord(tenant="demo", quota=Quota(tokens_per_minute=1000, requests_per_minute=1))
    )
    await complete(http, model="sql", stream=True)
    assert (await complete(http, model="sql")).status_code == 429
    page = await page_of(world)
    found = families({name for name, _ in page})
    assert {spec.name for spec in SPECS if spec.source is Source.GATEWAY} <= found
    for (name, labels), _ in page.items():
        spec = next((spec for spec in SPECS if spec.name in families([name])), None)
        if spec is not None:
            assert {label for label, _ in labels} - {"le"} == set(spec.all_labels), name
    (info,) = [labels for labels, _ in of(page, "slipstream_adapter_info")]
    assert info == {
        "replica": "gateway",
        "adapter": version.digest[7:19],
        "tenant": "demo",
        "name": "sql",
        "version": "1",
    }


async def test_calls_by_adapter_and_tenant(world: ApiWorld, http: httpx.AsyncClient) -> None:
    version = await world.publish("sql")
    label = version.digest[7:19]
    await complete(http, model="sql", stream=True, speculation=True)
    await complete(http, model="sql", n=2)
    world.engine.enqueue(FakeAnswer((" a", " b"), fail_after=1, error=EngineFailed("gone")))
    await complete(http, model="sql", stream=True)
    world.engine.refusal = Overloaded("full")
    assert (await complete(http, model="sql")).status_code == 429
    page = await page_of(world)
    for outcome, count in (("ok", 2), ("failed", 1), ("refused", 1), ("cancelled", 0)):
        assert total(page, "slipstream_adapter_requests_total", adapter=label, outcome=outcome) == count
        assert total(page, "slipstream_tenant_requests_total", tenant="demo", outcome=outcome) == count
    assert total(page, "slipstream_broken_streams_total", model=BASE) == 1
    assert total(page, "slipstream_adapter_completion_tokens_total", adapter=label) == 15
    assert total(page, "slipstream_tenant_tokens_total", tenant="demo", kind="prompt") == 9
    assert total(page, "slipstream_tenant_tokens_total", tenant="demo", kind="completion") == 16
    assert total(page, "slipstream_tenant_rejections_total", tenant="demo", reason="overloaded") == 1
    assert total(page, "slipstream_adapter_time_to_first_token_seconds_count", adapter=label) == 2
    assert total(page, "slipstream_adapter_drafts_accepted_total", adapter=label, position="1") > 0


async def test_quotas_and_refusals(world: ApiWorld, http: httpx.AsyncClient) -> None:
    quota = Quota(requests_per_minute=4, tokens_per_month=1000)
    await world.tenants.put_tenant(TenantRecord(tenant="demo", quota=quota))
    for _ in range(5):
        last = await complete(http)
    assert last.status_code == 429
    page = await page_of(world)
    assert total(page, "slipstream_tenant_rejections_total", tenant="demo", reason="requests_per_minute") == 1
    assert total(page, "slipstream_tenant_quota_used_ratio", quota="requests_per_minute") == pytest.approx(1.0)
    counts = UsageCounts(requests=1, prompt_tokens=400, completion_tokens=100)
    settled = Settlement(request_id="x", tenant="demo", day=utc_now().date(), model=BASE, reserved=0, counts=counts)
    await world.tenants.settle(settled)
    assert total(await page_of(world), "slipstream_tenant_quota_used_ratio", quota="tokens_per_month") == 0.0
    world.clock.advance(61.0)
    assert total(await page_of(world), "slipstream_tenant_quota_used_ratio", quota="tokens_per_month") == 0.5


async def test_the_registry_and_the_engine_are_away(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await complete(http)
    world.engine.outage = Unavailable("away")
    world.store.outage = StoreUnavailable("away")
    world.rebuild(registry_failures=lambda: 3)
    page = await page_of(world)
    assert total(page, "slipstream_replica_up", role="engine") == 0
    assert len(list(of(page, "slipstream_replica_up"))) == 2
    assert total(page, "slipstream_registry_up") == 0
    assert total(page, "slipstream_registry_errors_total") == 3


async def test_other_processes_are_on_the_page(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await complete(http)
    peers = world.app.state.runtime.services.peers
    other = ApiWorld(world.upload_dir)
    peers.others = [other.app.state.runtime.metrics.page(Process("other"), Surroundings())]
    peers.silent = [Process("stuck")]
    page = await page_of(world)
    up = {labels["replica"]: value for labels, value in of(page, "slipstream_replica_up")}
    assert up == {"gateway": 1, "other": 1, "stuck": 0, f"{BASE}-0": 1}


async def test_uploads_are_counted_by_how_they_end(world: ApiWorld, http: httpx.AsyncClient, tmp_path: Path) -> None:
    good, bad = write_adapter(tmp_path / "good"), write_adapter(tmp_path / "bad", nan=True)
    for folder, status in ((good, 201), (good, 200), (bad, 400)):
        answer = await http.post("/v1/adapters", data={"name": "sql"}, files=form_files(folder))
        assert answer.status_code == status, answer.text
    page = await page_of(world)
    published = {labels["outcome"]: value for labels, value in of(page, "slipstream_publishes_total")}
    assert published == {"new": 1, "existing": 1, "rejected": 1, "failed": 0}


async def test_names_are_for_those_with_a_key(world: ApiWorld, http: httpx.AsyncClient) -> None:
    version = await world.publish("sql")
    await complete(http, model="sql")
    world.rebuild(metrics_key_sha256=hash_key(METRICS_KEY))
    async with world.client(await world.key()) as client:
        await complete(client, model="sql")
        assert (await client.get("/metrics")).status_code == 401, "a tenant's key"
    async with world.client(None) as client:
        text = (await client.get("/metrics")).text
        assert (await client.get("/metrics", headers={"Authorization": "Basic abc"})).status_code == 401
    assert "demo" not in text
    assert version.digest[7:19] not in text
    assert total(parse(text), "slipstream_requests_total", outcome="ok") == 1
    for key in (METRICS_KEY, ADMIN_KEY):
        assert total(await page_of(world, key), "slipstream_tenant_requests_total", tenant="demo") == 1
    async with world.client(METRICS_KEY) as client:
        assert (await client.get("/v1/models")).status_code == 401, "it opens nothing else"
