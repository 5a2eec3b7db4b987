"""One suite for every `Store`: users, and keys that belong to them."""

from __future__ import annotations

import pytest

from adapter_registry.errors import NotPublished
from adapter_registry.keys import Role, UserRecord, new_key
from adapter_registry.records import utc_now
from adapter_registry.store import Store


def user(name: str = "ann", role: Role = Role.PUBLISHER, tenant: str = "acme") -> UserRecord:
    return UserRecord(tenant=tenant, name=name, role=role, created_at=utc_now())


async def test_users_are_kept_by_tenant(store: Store) -> None:
    ann, bob = user("ann"), user("bob", Role.CALLER)
    for each in (bob, ann, ann):
        await store.put_user(each, "key_1")
    await store.put_user(user("ann", tenant="globex"))
    assert list(await store.list_users("acme")) == [ann, bob]
    assert await store.list_users("initech") == []
    entries = [(e.action, e.subject, e.by) for e in await store.audit_log("acme", 10)]
    assert entries == [("user.changed", "ann", "key_1"), ("user.changed", "bob", "key_1")]


async def test_a_key_needs_its_user_and_may_no_more(store: Store) -> None:
    _, key = new_key("acme", user="ann")
    with pytest.raises(NotPublished):
        await store.put_key(key)
    assert await store.find_key(key.sha256) is None
    await store.put_user(user(role=Role.CALLER))
    with pytest.raises(NotPublished):
        await store.put_key(key)
    await store.put_user(user(role=Role.ADMIN))
    await store.put_key(key)
    assert await store.find_key(key.sha256) == key
    await store.put_user(user(role=Role.CALLER))
    found = await store.find_key(key.sha256)
    assert found is not None
    assert found.role is Role.CALLER
    assert await store.list_keys("acme") == [found]


async def test_a_user_goes_with_its_keys(store: Store) -> None:
    await store.put_user(user())
    made = [new_key("acme", user="ann")[1] for _ in range(2)]
    _, other = new_key("acme")
    for key in (*made, other):
        await store.put_key(key)
    assert sorted(await store.delete_user("acme", "ann", "key_1")) == sorted(key.id for key in made)
    assert await store.list_users("acme") == []
    assert await store.list_keys("acme") == [other]
    assert await store.find_key(made[0].sha256) is None
    for tenant, name in (("acme", "ann"), ("globex", "ann")):
        with pytest.raises(NotPublished):
            await store.delete_user(tenant, name)
