"""One suite for every `TenantStore`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

import pytest

from adapter_registry.errors import InvalidName
from adapter_registry.limits import Exceeded, Quota, Verdict
from adapter_registry.records import utc_now
from adapter_registry.store import Store
from adapter_registry.tenants import Settlement, TenantRecord, TenantStore, UsageCounts, UsageRow

TODAY = utc_now().date()


async def given(tenants: TenantStore, **quota: Any) -> None:
    await tenants.put_tenant(TenantRecord(tenant="acme", quota=Quota(**quota)))


async def ask(tenants: TenantStore, request_id: str, tokens: int = 10) -> Verdict:
    return (await tenants.admit("acme", request_id, tokens)).verdict


def ended(request_id: str, reserved: int = 0, model: str = "sql@1", day: date = TODAY, **counts: int) -> Settlement:
    used = UsageCounts(requests=1, **counts)
    return Settlement(request_id=request_id, tenant="acme", day=day, model=model, reserved=reserved, counts=used)


async def test_a_tenant_without_settings_has_the_defaults_and_no_limit(tenants: TenantStore) -> None:
    found = await tenants.get_tenant("acme")
    assert (found.tenant, found.quota, found.weight) == ("acme", Quota(), 1.0)
    answers = [await tenants.admit("acme", f"r{i}", 10**9) for i in range(50)]
    assert {answer.verdict for answer in answers} == {Verdict()}
    assert answers[0].tenant.quota == Quota()
    with pytest.raises(InvalidName):
        await tenants.get_tenant("No Such Name")


async def test_settings_come_back_exactly_and_hold_from_the_next_request_on(tenants: TenantStore, store: Store) -> None:
    record = TenantRecord(tenant="acme", quota=Quota(requests_per_minute=1, tokens_per_month=10**12), weight=2.5)
    await tenants.put_tenant(record)
    assert await tenants.get_tenant("acme") == record
    assert "acme" in await store.tenants()
    assert (await tenants.admit("acme", "a", 1)).tenant == record
    assert (await ask(tenants, "b")).exceeded is Exceeded.REQUESTS
    await given(tenants)
    assert await ask(tenants, "b") == Verdict()


async def test_whether_prompts_are_logged_is_kept_and_off_unless_it_is_on(tenants: TenantStore, store: Store) -> None:
    assert not (await tenants.get_tenant("acme")).log_prompts
    for wanted in (True, False):
        record = TenantRecord(tenant="acme", log_prompts=wanted)
        await tenants.put_tenant(record, "admin")
        assert (await tenants.admit("acme", f"r{wanted}", 1)).tenant == record
        newest = next(iter(await store.audit_log("acme", 1)))
        assert ("log_prompts" in newest.detail) is wanted, "gateways of before it can read what does not use it"


async def test_requests_of_a_minute(tenants: TenantStore) -> None:
    await given(tenants, requests_per_minute=3)
    lefts = [(await ask(tenants, f"r{i}")).requests_left for i in range(3)]
    assert lefts == pytest.approx([2, 1, 0], abs=0.2)
    refused = await ask(tenants, "r3")
    assert refused.exceeded is Exceeded.REQUESTS
    assert 15 < refused.retry_after_s <= 20  # a third of a minute each
    assert refused.requests_left == pytest.approx(0, abs=0.2)
    assert refused.tokens_left is None


async def test_an_allowance_fills_up_again_evenly(tenants: TenantStore) -> None:
    await given(tenants, requests_per_minute=30)
    answers = [await ask(tenants, f"r{i}") for i in range(40)]
    assert 30 <= sum(answer.exceeded is None for answer in answers) < 40
    assert 0 < answers[-1].retry_after_s <= 2
    await asyncio.sleep(answers[-1].retry_after_s + 0.1)
    assert (await ask(tenants, "later")).exceeded is None


async def test_tokens_of_a_minute_are_charged_first_and_corrected_at_the_end(tenants: TenantStore) -> None:
    await given(tenants, tokens_per_minute=1000)
    assert (await ask(tenants, "a", 900)).tokens_left == pytest.approx(100, abs=20)
    refused = await ask(tenants, "b", 500)
    assert refused.exceeded is Exceeded.TOKENS
    assert refused.retry_after_s == pytest.approx(24, abs=2)
    await tenants.settle(ended("a", 900, prompt_tokens=60, completion_tokens=40))
    assert (await ask(tenants, "b", 500)).tokens_left == pytest.approx(400, abs=30)
    await tenants.settle(ended("b", 500, completion_tokens=1500))  # more than was thought: the next ones wait longer
    refused = await ask(tenants, "c", 100)
    assert refused.retry_after_s == pytest.approx(42, abs=4)
    assert refused.tokens_left == pytest.approx(-600, abs=60)


async def test_a_request_larger_than_the_allowance_needs_a_full_one(tenants: TenantStore) -> None:
    await given(tenants, tokens_per_minute=100)
    assert (await ask(tenants, "large", 10**6)).exceeded is None
    assert (await ask(tenants, "next", 10**6)).retry_after_s == pytest.approx(60, abs=2)
    await tenants.settle(ended("large", 10**6, completion_tokens=0))
    assert (await ask(tenants, "next", 10**6)).exceeded is None


async def test_requests_at_once(tenants: TenantStore) -> None:
    await given(tenants, concurrent_requests=2)
    assert [(await ask(tenants, name)).exceeded for name in "abc"] == [None, None, Exceeded.CONCURRENT]
    assert (await ask(tenants, "a")).exceeded is None  # the same request, asked again
    await tenants.settle(ended("b"))
    assert [(await ask(tenants, name)).exceeded for name in "cd"] == [None, Exceeded.CONCURRENT]


async def test_a_request_whose_gateway_died_does_not_count_for_ever(make_tenants: Callable[..., TenantStore]) -> None:
    tenants = make_tenants(lease_s=0.4)
    await given(tenants, concurrent_requests=2)
    assert [(await ask(tenants, name)).exceeded for name in "abc"] == [None, None, Exceeded.CONCURRENT]
    for _ in range(3):
        await asyncio.sleep(0.2)
        await tenants.renew("acme", ["a", "unknown"])
    assert [(await ask(tenants, name)).exceeded for name in "cd"] == [None, Exceeded.CONCURRENT]


async def test_a_refused_request_is_charged_nothing(tenants: TenantStore) -> None:
    await given(tenants, requests_per_minute=100, tokens_per_minute=50, concurrent_requests=5)
    first = await ask(tenants, "a", 50)
    for i in range(20):
        assert (await ask(tenants, f"r{i}", 50)).exceeded is Exceeded.TOKENS
    last = await ask(tenants, "z", 50)
    assert last.requests_left == pytest.approx(first.requests_left, abs=2)
    assert last.tokens_left == pytest.approx(0, abs=3)


async def test_the_same_request_is_charged_once(tenants: TenantStore) -> None:
    await given(tenants, requests_per_minute=100, tokens_per_minute=1000)
    for _ in range(5):
        answer = await ask(tenants, "a", 100)
    assert answer.tokens_left == pytest.approx(900, abs=40)
    assert answer.requests_left == pytest.approx(99, abs=2)


async def test_tokens_of_a_month(tenants: TenantStore) -> None:
    await given(tenants, tokens_per_month=100)
    await tenants.settle(ended("old", completion_tokens=10**6, day=TODAY.replace(day=1) - timedelta(days=1)))
    assert (await ask(tenants, "a")).exceeded is None
    await tenants.settle(ended("a", prompt_tokens=40, completion_tokens=60))
    assert (await ask(tenants, "b")).exceeded is Exceeded.MONTH
    await given(tenants, tokens_per_month=101)
    assert (await ask(tenants, "b")).exceeded is None


async def test_usage_is_counted_once_by_day_and_model(tenants: TenantStore) -> None:
    yesterday = TODAY - timedelta(days=1)
    counts: dict[str, Any] = {"prompt_tokens": 5, "completion_tokens": 7, "drafted_tokens": 9, "accepted_tokens": 4}
    assert await tenants.settle(ended("a", **counts))
    assert not await tenants.settle(ended("a", **counts))
    assert await tenants.settle(ended("b", **counts))
    assert await tenants.settle(ended("c", model="base|x", completion_tokens=1))
    assert await tenants.settle(ended("d", day=yesterday, prompt_tokens=3))
    rows = await tenants.usage("acme", yesterday, TODAY)
    twice = UsageCounts(requests=2, **{name: 2 * number for name, number in counts.items()})
    assert rows == [
        UsageRow(day=yesterday, model="sql@1", counts=UsageCounts(requests=1, prompt_tokens=3)),
        UsageRow(day=TODAY, model="base|x", counts=UsageCounts(requests=1, completion_tokens=1)),
        UsageRow(day=TODAY, model="sql@1", counts=twice),
    ]
    assert [row.day for row in await tenants.usage("acme", yesterday, yesterday)] == [yesterday]
    assert await tenants.usage("other", yesterday, TODAY) == []


async def test_many_at_once_never_pass_a_limit(tenants: TenantStore) -> None:
    await given(tenants, requests_per_minute=40, concurrent_requests=25)
    verdicts = await asyncio.gather(*(ask(tenants, f"r{i}") for i in range(100)))
    assert sum(verdict.exceeded is None for verdict in verdicts) == 25
