"""What only a store on a server can get wrong: the server goes away, forgets scripts, or holds a newer schema."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from support.drafts import draft, publish, rows, sha
from support.redis_server import RedisServer, free_port, running_redis

from adapter_registry.errors import NotPublished, StoreUnavailable
from adapter_registry.keys import new_key
from adapter_registry.limits import Quota
from adapter_registry.migrations import SCHEMA
from adapter_registry.records import Access, SpeculationPolicy, parse_reference, utc_now
from adapter_registry.redis_jobs import RedisJobs
from adapter_registry.redis_store import RedisStore
from adapter_registry.redis_tenants import RedisTenants
from adapter_registry.scripts import CHANGES_KEY, SCHEMA_KEY
from adapter_registry.tenants import Settlement, TenantRecord, UsageCounts

pytestmark = pytest.mark.redis


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with running_redis() as running:
        yield running


@pytest_asyncio.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    made = RedisStore.from_url(server.url, timeout_s=0.5)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def raw(server: RedisServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(server.url, decode_responses=True, protocol=2) as client:
        yield client


async def test_data_scripts_and_connections_survive_a_crash_of_redis(server: RedisServer, store: RedisStore) -> None:
    first = await publish(store, draft("a"))
    await store.set_alias("acme", "sql", "prod", 1)
    _, key = new_key("acme")
    await store.put_key(key)
    server.stop(kill=True)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.resolve("acme", parse_reference("sql"))
    assert time.monotonic() - started < 5
    server.start()
    assert await store.resolve("acme", parse_reference("sql@prod")) == first
    assert await store.find_key(key.sha256) == key
    assert (await publish(store, draft("b"))).version == 2


async def test_scripts_survive_a_flush(store: RedisStore, raw: Redis) -> None:
    await publish(store, draft("a"))
    await raw.script_flush()
    assert (await publish(store, draft("b"))).version == 2
    await raw.script_flush()
    assert len(await store.delete("acme", "sql")) == 2


async def test_every_key_is_ours_and_a_tenant_is_one_slot(store: RedisStore, raw: Redis) -> None:
    await publish(store, draft("a"))
    await publish(store, draft("b"))
    await store.set_alias("acme", "sql", "prod", 1)
    await store.delete("acme", "sql", 2)
    await store.begin_sweep("acme", 0)
    _, key = new_key("acme")
    await store.put_key(key)
    await store.claim_blobs("acme", ["0" * 64])
    keys = {str(name) for name in await raw.keys("*")}
    shared = {SCHEMA_KEY, CHANGES_KEY, "slipstream:tenants", f"slipstream:keys:{{{key.sha256}}}"}
    assert shared < keys
    assert all(name.startswith("slipstream:{acme}:") for name in keys - shared)
    assert len(keys - shared) == 12


async def test_a_blob_is_in_use_or_garbage_or_being_deleted_and_never_two_of_them(
    store: RedisStore, raw: Redis
) -> None:
    async def held() -> list[int]:
        prefix = "slipstream:{acme}:"
        return [
            await raw.hlen(prefix + "refs"),
            await raw.zcard(prefix + "garbage"),
            await raw.zcard(prefix + "deleting"),
        ]

    made = draft("a")
    await store.claim_blobs("acme", made.blob_sha256s)
    assert await held() == [0, 3, 0]
    await store.publish(made)
    assert await held() == [3, 0, 0]
    await store.claim_blobs("acme", made.blob_sha256s)
    assert await held() == [3, 0, 0]
    await store.delete("acme", "sql")
    assert await held() == [0, 3, 0]
    swept = await store.begin_sweep("acme", 0)
    assert await held() == [0, 0, 3]
    await store.end_sweep("acme", swept)
    assert await held() == [0, 0, 0]


async def test_nothing_of_an_adapter_is_left_but_its_number(store: RedisStore, raw: Redis) -> None:
    await publish(store, draft("a"))
    await store.set_alias("acme", "sql", "prod", 1)
    await store.delete("acme", "sql")
    await store.end_sweep("acme", await store.begin_sweep("acme", 0))
    left = {CHANGES_KEY, "slipstream:tenants", "slipstream:{acme}:numbers", "slipstream:{acme}:audit"}
    assert set(await raw.keys("*")) == {SCHEMA_KEY, *left}


async def test_a_version_from_before_there_were_policies_speculates(store: RedisStore, raw: Redis) -> None:
    made = await publish(store, draft("a"))
    key = "slipstream:{acme}:adapter:sql:versions"
    envelope = json.loads(await raw.hget(key, "1") or "")
    del envelope["record"]["speculation"]
    await raw.hset(key, "1", json.dumps(envelope))
    assert await store.resolve("acme", parse_reference("sql")) == made
    off = SpeculationPolicy(enabled=False, reason="slow")
    assert (await store.set_speculation("acme", "sql", 1, off)).speculation == off
    assert (await store.get("acme", "sql")).versions[0].speculation == off


async def test_a_policy_does_not_bring_a_deleted_version_back(store: RedisStore, raw: Redis) -> None:
    """The version goes between the look at it and the script."""
    await publish(store, draft("a"))
    ask = store._command

    async def then_delete(*words: str) -> Any:
        found = await ask(*words)
        if words[0] == "HGET":
            await raw.delete("slipstream:{acme}:adapter:sql:versions")
        return found

    store._command = then_delete  # type: ignore[method-assign]
    with pytest.raises(NotPublished):
        await store.set_speculation("acme", "sql", 1, SpeculationPolicy(enabled=False))
    assert await raw.hlen("slipstream:{acme}:adapter:sql:versions") == 0


@pytest.mark.parametrize("order", ["put", "delete"])
async def test_a_crash_between_two_slots_leaves_no_usable_key(
    store: RedisStore, raw: Redis, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = new_key("acme")
    if order == "delete":
        await store.put_key(key)
    method = "_command" if order == "put" else "_script"  # the second step of each
    real = getattr(RedisStore, method)

    async def crashing(self: RedisStore, first: str, *rest: Any) -> object:
        if first in {"SET", "write_key"}:
            raise StoreUnavailable("crash")
        return await real(self, first, *rest)

    monkeypatch.setattr(RedisStore, method, crashing)
    with pytest.raises(StoreUnavailable):
        await (store.put_key(key) if order == "put" else store.delete_key("acme", key.id))
    monkeypatch.undo()
    assert await store.find_key(key.sha256) is None
    assert await store.list_keys("acme") == [key]  # people see it, and can finish the work
    await store.delete_key("acme", key.id)
    assert await store.list_keys("acme") == []


async def test_data_of_a_newer_schema_is_not_touched(server: RedisServer, raw: Redis) -> None:
    newer = str(SCHEMA + 1)
    await raw.set(SCHEMA_KEY, newer)
    store = RedisStore.from_url(server.url)
    for _ in range(2):  # a refusal is not forgotten by the second call
        with pytest.raises(StoreUnavailable, match=f"schema '{newer}'"):
            await store.claim_blobs("acme", [])
    await store.close()
    assert await raw.keys("*") == [SCHEMA_KEY]


async def test_data_of_schema_1_learns_what_it_weighs(server: RedisServer, raw: Redis, store: RedisStore) -> None:
    made = [await publish(store, draft("a", attachment="card")), await publish(store, draft("b"))]
    jobs = RedisJobs.from_url(server.url)
    await store.claim_blobs("acme", [sha("rows")])
    await jobs.add_file(rows("rows"))
    weight = sum((made[0].blob_sizes | made[1].blob_sizes).values()) + 4
    assert await store.stored_bytes("acme") == weight
    await raw.delete("slipstream:{acme}:sizes")
    await raw.set(SCHEMA_KEY, "1")
    new = [RedisStore.from_url(server.url) for _ in range(3)]
    assert await asyncio.gather(*(each.stored_bytes("acme") for each in new)) == [weight] * 3
    assert await raw.get(SCHEMA_KEY) == str(SCHEMA)
    await raw.hset("slipstream:{acme}:sizes", sha("gone"), 99)  # as an older gateway's delete leaves it
    await raw.hincrby("slipstream:{acme}:sizes", "total", 99)
    await store.mend_sizes("acme")
    assert await store.stored_bytes("acme") == weight
    await new[0].delete("acme", "sql")
    assert await store.stored_bytes("acme") == 4
    for each in (*new, jobs):
        await each.close()


async def test_a_wrong_password_is_told_without_telling_any(server: RedisServer) -> None:
    store = RedisStore.from_url(f"redis://:hunter2@127.0.0.1:{server.port}/0")
    with pytest.raises(StoreUnavailable) as caught:
        await store.ping()
    await store.close()
    for secret in ("hunter2", server.password, str(server.port), "127.0.0.1"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_nobody_there_is_noticed_quickly(scheme: str) -> None:
    store = RedisStore.from_url(f"{scheme}://:hunter2@127.0.0.1:{free_port()}/0", timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="cannot be reached") as caught:
        await store.ping()
    assert time.monotonic() - started < 3
    assert "hunter2" not in str(caught.value)
    await store.close()


async def test_a_server_that_never_answers_is_given_up() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client hangs up
        writer.close()

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    store = RedisStore.from_url(f"redis://127.0.0.1:{port}/0", timeout_s=0.1, retries=1)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.ping()
    assert time.monotonic() - started < 3
    await store.close()
    listener.close()
    await listener.wait_closed()


async def test_a_full_pool_is_waited_for_not_overrun(server: RedisServer) -> None:
    store = RedisStore.from_url(server.url, max_connections=2)
    versions = await asyncio.gather(*(publish(store, draft(f"content {i}")) for i in range(30)))
    assert sorted(v.version for v in versions) == list(range(1, 31))
    await store.close()


async def test_a_rollback_that_is_sent_again_because_its_answer_was_lost_is_done_once(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client resends the same words; going back twice would be where the trouble was."""
    for letter in "ab":
        await publish(store, draft(letter))
    for version in (1, 2):
        await store.set_alias("acme", "sql", "prod", version)
    now = utc_now()
    monkeypatch.setattr("adapter_registry.redis_aliases.utc_now", lambda: now)
    assert await store.roll_back_alias("acme", "sql", "prod", "key_a") == 1
    await store.set_alias("acme", "sql", "canary", 2, "key_a")
    assert await store.roll_back_alias("acme", "sql", "prod", "key_a") == 1
    assert (await store.get("acme", "sql")).aliases["prod"] == 1


async def test_an_alias_that_was_moved_before_this_was_remembered_goes_back_as_well(
    store: RedisStore, raw: Redis
) -> None:
    for letter in "ab":
        await publish(store, draft(letter))
    for version in (1, 2):
        await store.set_alias("acme", "sql", "prod", version)
    await raw.delete("slipstream:{acme}:adapter:sql:before")
    assert await store.roll_back_alias("acme", "sql", "prod") == 1


async def test_sharing_what_is_not_there_leaves_nothing_with_others(store: RedisStore, raw: Redis) -> None:
    with pytest.raises(NotPublished):
        await store.set_access("acme", "none", Access(public=True, tenants=("globex",)))
    assert await raw.keys("*globex*") == []
    assert not await raw.exists("slipstream:public")
    await publish(store, draft("a"))
    await store.set_access("acme", "sql", Access(public=True, tenants=("globex",)))
    await store.set_access("acme", "sql", Access())
    assert await store.shared_with("globex") == []
    assert await raw.keys("*globex*") == []  # a listing drops what leads nowhere


async def test_keys_with_nothing_new_are_written_as_they_were_before(store: RedisStore, raw: Redis) -> None:
    """So that gateways of the version before read them during an update."""
    _, key = new_key("acme", "ci")
    await store.put_key(key)
    written = json.loads(await raw.get(f"slipstream:keys:{{{key.sha256}}}") or "")
    assert set(written) == {"id", "tenant", "sha256", "prefix", "created_at", "label"}


async def test_a_user_who_may_only_touch_our_keys_is_enough(server: RedisServer, raw: Redis) -> None:
    """The rights that the README names: no administration, no other keys."""
    rights = ["~slipstream:*", "+@read", "+@write", "+@scripting", "+@connection", "+time", "+select"]
    rights += ["-@admin", "-@dangerous", "+cluster|slots"]
    await raw.execute_command("ACL", "SETUSER", "slipstream", "on", ">pw", *rights)  # type: ignore[no-untyped-call]
    url = f"redis://slipstream:pw@127.0.0.1:{server.port}/1"
    store, tenants = RedisStore.from_url(url), RedisTenants.from_url(url)
    try:
        await publish(store, draft("a"))
        await store.set_alias("acme", "sql", "prod", 1)
        await store.set_access("acme", "sql", Access(public=True))
        assert len(await store.shared_with("globex")) == 1
        _, key = new_key("acme")
        await store.put_key(key)
        await store.note_key_use("acme", key.id)
        assert await store.find_key(key.sha256) == key
        assert len(await store.audit_log("acme", 10)) == 4
        await tenants.put_tenant(TenantRecord(tenant="acme", quota=Quota(concurrent_requests=1)))
        assert (await tenants.admit("acme", "r", 1)).verdict.exceeded is None
        await tenants.renew("acme", ["r"])
        used = UsageCounts(requests=1)
        day = utc_now().date()
        await tenants.settle(Settlement(request_id="r", tenant="acme", day=day, model="sql@1", reserved=1, counts=used))
        assert [row.counts for row in await tenants.usage("acme", day, day)] == [used]
        await store.delete("acme", "sql")
        await store.end_sweep("acme", await store.begin_sweep("acme", 0))
        with pytest.raises(StoreUnavailable, match="user's rights"):
            await store._command("SET", "others", "x")
    finally:
        await store.close()
        await tenants.close()
