"""One suite for every `Store`: what a tenant's content weighs and may weigh, labels, and where versions come from."""

from __future__ import annotations

import pytest
from support.drafts import draft, publish, rows, sha

from adapter_registry.errors import NotPublished, StorageFull
from adapter_registry.jobs import JobStore
from adapter_registry.limits import Quota
from adapter_registry.records import Lineage
from adapter_registry.store import Store
from adapter_registry.tenants import TenantRecord, TenantStore


async def test_equal_content_weighs_once(store: Store, jobs: JobStore) -> None:
    assert await store.stored_bytes("acme") == 0
    first = await publish(store, draft("first"))
    assert await store.stored_bytes("acme") == sum(first.blob_sizes.values())
    second = await publish(store, draft("second!"))  # the same config
    both = first.blob_sizes | second.blob_sizes
    assert await store.stored_bytes("acme") == sum(both.values())
    await publish(store, draft("first", name="other"))
    assert await store.stored_bytes("acme") == sum(both.values())
    file = rows("first")  # even as a training file
    await store.claim_blobs("acme", [file.sha256])
    await jobs.add_file(file)
    assert await store.stored_bytes("acme") == sum(both.values())
    await store.delete("acme", "other")
    await store.delete("acme", "sql")
    assert await store.stored_bytes("acme") == len("first")
    await jobs.delete_file("acme", file.id)
    assert await store.stored_bytes("acme") == 0
    assert await store.stored_bytes("globex") == 0


async def test_a_full_tenant_publishes_nothing_until_something_goes(
    store: Store, tenants: TenantStore, jobs: JobStore
) -> None:
    first, second = draft("a" * 100), draft("b" * 100)
    room = sum((first.blob_sizes | second.blob_sizes).values()) - 1
    await tenants.put_tenant(TenantRecord(tenant="acme", quota=Quota(storage_bytes=room)))
    await publish(store, first)
    with pytest.raises(StorageFull, match=f"{room} bytes"):
        await publish(store, second)
    assert [v.version for v in (await store.get("acme", "sql")).versions] == [1]
    assert (await publish(store, first)).version == 1  # weighs nothing more
    file = rows("c" * (room - sum(first.blob_sizes.values()) + 1))
    await store.claim_blobs("acme", [file.sha256])
    with pytest.raises(StorageFull):
        await jobs.add_file(file)
    await publish(store, draft("b" * 100, tenant="globex"))  # others have their own
    await store.delete("acme", "sql", 1)
    assert (await publish(store, second)).version == 2
    await tenants.put_tenant(TenantRecord(tenant="acme"))
    assert (await publish(store, draft("c" * 1000))).version == 3


async def test_labels_change_and_lineage_stays(store: Store) -> None:
    lineage = Lineage(training_job="ftjob-1", parent="sql@1", data_sha256=sha("rows"), evaluation={"eval_loss": 0.25})
    made = draft("a").model_copy(update={"labels": {"team": "search"}, "lineage": lineage})
    first = await publish(store, made)
    assert first.labels == {"team": "search"}
    changed = await store.set_labels("acme", "sql", 1, {"stage": "tested", "owner": "über ✓"})
    assert changed.labels == {"stage": "tested", "owner": "über ✓"}
    assert (await store.get("acme", "sql")).versions == (changed,)
    assert changed.lineage == lineage
    assert changed.digest == first.digest
    assert (await store.set_labels("acme", "sql", 1, {})).labels == {}
    for name, version in (("sql", 2), ("none", 1)):
        with pytest.raises(NotPublished):
            await store.set_labels("acme", name, version, {"a": "b"})
    with pytest.raises(NotPublished):
        await store.set_labels("globex", "sql", 1, {"a": "b"})
