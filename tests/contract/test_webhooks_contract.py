"""One suite for every `WebhookStore`: what each is still to be told, and who tells it."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import SecretStr
from support.drafts import draft, publish

from adapter_registry.errors import InUse, NotPublished
from adapter_registry.jobs import new_id
from adapter_registry.records import utc_now
from adapter_registry.store import Store
from adapter_registry.webhooks import MAX_WEBHOOKS, WEBHOOK_PREFIX, Delivery, WebhookRecord, WebhookStore


def webhook(tenant: str = "acme") -> WebhookRecord:
    return WebhookRecord(
        id=new_id(WEBHOOK_PREFIX), tenant=tenant, url="https://example.com/hooks", secret=SecretStr("whsec_c2VjcmV0"),
        created_at=utc_now(),
    )  # fmt: skip


async def test_it_is_told_of_what_happens_from_then_on(store: Store, webhooks: WebhookStore) -> None:
    await publish(store, draft("a"))
    made = webhook()
    await webhooks.add(made)
    await webhooks.add(made)  # a retry
    assert await webhooks.list("acme") == [made]
    assert made.secret.get_secret_value() not in repr(made)
    assert await webhooks.pending("acme", made.id, 10) == []
    await publish(store, draft("b"))
    await store.set_alias("acme", "sql", "prod", 2)
    await publish(store, draft("a", tenant="globex"))
    first, second = await webhooks.pending("acme", made.id, 10)
    assert (first.subject, second.subject) == ("sql@2", "sql@prod")
    assert await webhooks.pending("acme", made.id, 1) == [first]
    await webhooks.advance("acme", made.id, first.id)
    assert await webhooks.pending("acme", made.id, 10) == [second]
    await webhooks.advance("acme", made.id, second.id)
    assert await webhooks.pending("acme", made.id, 10) == []


async def test_a_tenant_that_never_did_anything(store: Store, webhooks: WebhookStore) -> None:
    made = webhook()
    await webhooks.add(made)
    await publish(store, draft("a"))
    assert len(await webhooks.pending("acme", made.id, 10)) == 1
    assert await webhooks.tenants() == ["acme"]


async def test_what_was_deleted_is_told_nothing(store: Store, webhooks: WebhookStore) -> None:
    made, other = webhook(), webhook("globex")
    await webhooks.add(made)
    await webhooks.add(other)
    with pytest.raises(NotPublished):
        await webhooks.delete("globex", made.id)
    await webhooks.delete("acme", made.id)
    with pytest.raises(NotPublished):
        await webhooks.delete("acme", made.id)
    await publish(store, draft("a"))
    assert await webhooks.pending("acme", made.id, 10) == []
    await webhooks.advance("acme", made.id, "1-1")
    await webhooks.note("acme", made.id, Delivery(at=utc_now(), event="1-1", ok=True))
    assert await webhooks.last("acme", made.id) is None
    assert await webhooks.tenants() == ["globex"]


async def test_how_it_went_last(webhooks: WebhookStore) -> None:
    made = webhook()
    await webhooks.add(made)
    assert await webhooks.last("acme", made.id) is None
    delivery = Delivery(at=utc_now(), event="1-1", ok=False, tries=3, status=500, error="no")
    await webhooks.note("acme", made.id, delivery)
    assert await webhooks.last("acme", made.id) == delivery


async def test_one_holder_at_a_time(webhooks: WebhookStore) -> None:
    taken = await asyncio.gather(*(webhooks.lease("acme", f"gateway-{i}", 0.2) for i in range(5)))
    assert sum(taken) == 1
    holder = f"gateway-{taken.index(True)}"
    assert await webhooks.lease("acme", holder, 0.2)
    assert await webhooks.lease("globex", "gateway-9", 0.2)
    await asyncio.sleep(0.3)
    assert await webhooks.lease("acme", "another", 0.2)
    assert not await webhooks.lease("acme", holder, 0.2)


async def test_there_is_a_bound(webhooks: WebhookStore) -> None:
    for _ in range(MAX_WEBHOOKS):
        await webhooks.add(webhook())
    with pytest.raises(InUse):
        await webhooks.add(webhook())
    await webhooks.add(webhook("globex"))
