"""One suite for every `Store`: aliases that move, adapters that are shared, and who did what."""

from __future__ import annotations

from datetime import timedelta

import pytest
from support.drafts import draft, publish

from adapter_registry.errors import InUse, InvalidName, NotPublished
from adapter_registry.keys import Role, new_key
from adapter_registry.records import Access, Split, parse_reference, utc_now
from adapter_registry.store import MOVES_KEPT, Store
from adapter_registry.tenants import TenantRecord, TenantStore

# --- aliases that move, and adapters that are shared ---


async def test_moves_of_aliases_are_kept_and_rolled_back(store: Store) -> None:
    for letter in "abc":
        await publish(store, draft(letter))
    for version in (1, 2, 2, 3):
        await store.set_alias("acme", "sql", "prod", version, "key_1")
    await store.set_alias("acme", "sql", "canary", 3)
    moves = await store.alias_moves("acme", "sql")
    assert [(m.alias, m.before, m.version, m.by) for m in moves] == [
        ("canary", None, 3, ""), ("prod", 2, 3, "key_1"), ("prod", 1, 2, "key_1"), ("prod", None, 1, "key_1"),
    ]  # fmt: skip
    assert await store.roll_back_alias("acme", "sql", "prod", "key_2") == 2
    assert (await store.resolve("acme", parse_reference("sql"))).version == 2
    assert await store.roll_back_alias("acme", "sql", "prod") == 3
    assert (await store.get("acme", "sql")).aliases == {"prod": 3, "canary": 3}
    await store.delete_alias("acme", "sql", "prod", "key_3")
    assert [(m.before, m.version, m.by) for m in (await store.alias_moves("acme", "sql"))[:2]] == [
        (3, None, "key_3"), (2, 3, ""),
    ]  # fmt: skip
    assert await store.roll_back_alias("acme", "sql", "prod") == 3
    assert await store.alias_moves("acme", "none") == []


async def test_an_alias_goes_back_however_often_others_were_moved(store: Store) -> None:
    for letter in "ab":
        await publish(store, draft(letter))
    for version in (1, 2):
        await store.set_alias("acme", "sql", "prod", version)
    for i in range(MOVES_KEPT + 10):
        await store.set_alias("acme", "sql", "staging", 1 + i % 2)
    assert len(await store.alias_moves("acme", "sql")) == MOVES_KEPT
    assert await store.roll_back_alias("acme", "sql", "prod") == 1


async def test_what_cannot_be_rolled_back_stays_where_it_is(store: Store) -> None:
    await publish(store, draft("a"))
    await publish(store, draft("b"))
    with pytest.raises(NotPublished):
        await store.roll_back_alias("acme", "sql", "prod")
    await store.set_alias("acme", "sql", "prod", 1)
    with pytest.raises(NotPublished):
        await store.roll_back_alias("acme", "sql", "prod")  # it was new
    await store.set_alias("acme", "sql", "prod", 2)
    await store.delete("acme", "sql", 1)
    with pytest.raises(NotPublished):
        await store.roll_back_alias("acme", "sql", "prod")  # that version is gone
    assert (await store.get("acme", "sql")).aliases == {"prod": 2}
    with pytest.raises(NotPublished):
        await store.roll_back_alias("globex", "sql", "prod")
    with pytest.raises(InvalidName):
        await store.roll_back_alias("acme", "sql", "2")


async def test_a_part_of_an_aliass_requests_goes_to_another_version(store: Store) -> None:
    for letter in "abc":
        await publish(store, draft(letter))

    async def at(reference: str, *points: float | None) -> list[int]:
        return [(await store.resolve("acme", parse_reference(reference), point)).version for point in points]

    await store.set_alias("acme", "sql", "prod", 1, split=Split(version=2, weight=0.25))
    for reference in ("sql", "sql@prod"):
        assert await at(reference, 0.0, 0.2499, 0.25, 0.99, None) == [2, 2, 1, 1, 1]
    assert await at("sql@1", 0.0) == [1]
    assert (await store.get("acme", "sql")).splits == {"prod": Split(version=2, weight=0.25)}
    with pytest.raises(InUse):
        await store.delete("acme", "sql", 2)
    with pytest.raises(NotPublished):
        await store.set_alias("acme", "sql", "prod", 1, split=Split(version=9, weight=0.5))
    assert await at("sql", 0.0) == [2]  # refused: as it was
    await store.set_alias("acme", "sql", "prod", 1, split=Split(version=2, weight=0.5))
    assert await at("sql", 0.3) == [2]
    assert await store.roll_back_alias("acme", "sql", "prod", "key_a") == 1  # first the split goes
    assert await at("sql", 0.0) == [1]
    assert (await store.get("acme", "sql")).splits == {}
    await store.set_alias("acme", "sql", "prod", 2)
    await store.set_alias("acme", "sql", "prod", 2, split=Split(version=3, weight=0.1))
    await store.set_alias("acme", "sql", "prod", 3)  # it did well
    assert await at("sql", 0.0, 0.9) == [3, 3]
    assert await store.roll_back_alias("acme", "sql", "prod") == 2
    moves = await store.alias_moves("acme", "sql")
    assert [(m.before, m.version, m.split and (m.split.version, m.split.weight)) for m in moves[:4]] == [
        (3, 2, None), (2, 3, None), (2, 2, (3, 0.1)), (1, 2, None),
    ]  # fmt: skip
    assert "0.1 of it to 3" in {e.detail.partition(", ")[2] for e in await store.audit_log("acme", 20)}
    await store.set_alias("acme", "sql", "prod", 2, split=Split(version=3, weight=0.1))
    await store.delete_alias("acme", "sql", "prod")
    assert (await store.get("acme", "sql")).splits == {}
    await store.delete("acme", "sql", 3)


async def test_a_shared_adapter_resolves_for_those_it_is_shared_with(store: Store) -> None:
    mine = await publish(store, draft("a"))
    await store.set_alias("acme", "sql", "prod", 1)
    references = [f"acme/sql{tag}" for tag in ("", "@1", "@prod", f"@{mine.digest}")]

    async def seen(tenant: str) -> set[bool]:
        found = set()
        for reference in references:
            try:
                found.add(await store.resolve(tenant, parse_reference(reference)) == mine)
            except NotPublished:
                found.add(False)
        return found

    assert [await seen(tenant) for tenant in ("acme", "globex", "initech")] == [{True}, {False}, {False}]
    await store.set_access("acme", "sql", Access(tenants=("globex",)))
    assert [await seen(tenant) for tenant in ("acme", "globex", "initech")] == [{True}, {True}, {False}]
    with pytest.raises(NotPublished):
        await store.resolve("globex", parse_reference("sql"))  # its own name space stays its own
    await store.set_access("acme", "sql", Access(public=True))
    assert [await seen(tenant) for tenant in ("acme", "globex", "initech")] == [{True}, {True}, {True}]
    await store.set_access("acme", "sql", Access())
    assert [await seen(tenant) for tenant in ("acme", "globex", "initech")] == [{True}, {False}, {False}]
    assert (await store.get("acme", "sql")).access == Access()
    with pytest.raises(NotPublished):
        await store.set_access("acme", "none", Access(public=True))


async def test_what_is_shared_is_listed_for_whom_and_only_as_long(store: Store) -> None:
    await publish(store, draft("a"))
    await publish(store, draft("b", name="mail"))

    async def names(tenant: str) -> list[str]:
        return [f"{found.tenant}/{found.name}" for found in await store.shared_with(tenant)]

    await store.set_access("acme", "sql", Access(tenants=("globex", "acme")))
    await store.set_access("acme", "mail", Access(public=True, tenants=("globex",)))
    assert await names("globex") == ["acme/mail", "acme/sql"]
    assert await names("initech") == ["acme/mail"]
    assert await names("acme") == []
    (shared,) = await store.shared_with("initech")
    assert shared.current is not None
    await store.set_access("acme", "mail", Access())
    assert await names("globex") == ["acme/sql"]
    await store.delete("acme", "sql")
    await publish(store, draft("c"))  # the name again, by its owner alone
    assert [await names(tenant) for tenant in ("globex", "initech")] == [[], []]
    with pytest.raises(NotPublished):
        await store.resolve("globex", parse_reference("acme/sql"))


# --- who did what ---


async def test_what_is_done_is_written_down_by_who_did_it(store: Store, tenants: TenantStore) -> None:
    first = await publish(store, draft("a"))
    await publish(store, draft("a"))  # nothing new
    await store.set_alias("acme", "sql", "prod", 1, "key_a")
    await store.set_alias("acme", "sql", "prod", 1, "key_a")  # nothing moved
    await store.set_access("acme", "sql", Access(tenants=("globex",)), "key_a")
    await store.delete_alias("acme", "sql", "prod", "key_b")
    await store.delete("acme", "sql", 1, "key_b")
    _, key = new_key("acme", "ci", role=Role.CALLER)
    await store.put_key(key, "admin")
    await store.replace_key(key.model_copy(update={"expires_at": utc_now()}), "admin")
    await store.delete_key("acme", key.id, "admin")
    await tenants.put_tenant(TenantRecord(tenant="acme", weight=2), "admin")
    entries = await store.audit_log("acme", 100)
    assert [(e.by, e.action, e.subject) for e in reversed(entries)] == [
        (first.created_by, "version.published", "sql@1"),
        ("key_a", "alias.moved", "sql@prod"),
        ("key_a", "access.changed", "sql"),
        ("key_b", "alias.moved", "sql@prod"),
        ("key_b", "version.deleted", "sql@1"),
        ("admin", "key.created", key.id),
        ("admin", "key.changed", key.id),
        ("admin", "key.revoked", key.id),
        ("admin", "tenant.changed", "acme"),
    ]
    details = [e.detail for e in reversed(entries)]
    assert (details[0], details[1], details[3]) == (first.digest, "none to 1", "1 to none")
    assert "caller ci" in details[5]
    assert '"weight":2' in details[8]
    assert all(utc_now() - e.at < timedelta(minutes=2) for e in entries)
    assert await store.audit_log("globex", 100) == []


async def test_the_audit_log_comes_in_pages(store: Store) -> None:
    for i in range(7):
        await store.put_key(new_key("acme", f"{i}")[1])
    found = list(await store.audit_log("acme", 3))
    while page := await store.audit_log("acme", 3, found[-1].id):
        found += page
    assert [e.detail for e in found] == [f"publisher {i}" for i in reversed(range(7))]
    for bad in ("x", "(5-0", "5-0 OR"):
        with pytest.raises(InvalidName):
            await store.audit_log("acme", 3, bad)
