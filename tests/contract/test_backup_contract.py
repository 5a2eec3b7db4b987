"""Backups of real registries, on one server and on a cluster: what comes back is what was there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from support.drafts import rows, sha
from support.registries import NAMES, TENANTS, Registry, bring_back, fill, registry_at, save
from support.s3_server import BUCKET, running_s3

import deployments.main  # noqa: F401 - adds its commands
from adapter_registry.backup.place import BackupPlace
from adapter_registry.backup.reading import Restore, find_problems, verify
from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.backup.snapshot import take_snapshot
from adapter_registry.backup.writing import back_up, prune
from adapter_registry.errors import (
    NotPublished,
)
from adapter_registry.jobs import PageQuery
from adapter_registry.migrations import SCHEMA
from adapter_registry.records import parse_reference, utc_now
from adapter_registry.redis_jobs import RedisJobs
from adapter_registry.redis_store import RedisStore
from adapter_registry.scripts import SCHEMA_KEY

pytestmark = [pytest.mark.redis]
ONE_SERVER = pytest.mark.parametrize("store_url", ["redis-tcp"], indirect=True)
EVERYWHERE = pytest.mark.parametrize("store_url", ["redis-tcp", "cluster"], indirect=True)


async def seen(registry: Registry) -> dict[str, Any]:
    """The registry as its users see it."""
    found: dict[str, Any] = {"tenants": await registry.store.tenants()}
    page, today = PageQuery(limit=1000), utc_now().date()
    for tenant in TENANTS:
        store = registry.store
        keys = await store.list_keys(tenant)
        jobs = (await registry.jobs.list_jobs(tenant, page)).items
        imports = (await registry.imports.list(tenant, page)).items
        hooks = await registry.webhooks.list(tenant)
        found[tenant] = {
            "adapters": await store.list(tenant),
            "shared": await store.shared_with(tenant),
            "moves": {name: await store.alias_moves(tenant, name) for name in NAMES},
            "keys": [(key, await store.find_key(key.sha256)) for key in keys],
            "uses": await store.key_uses(tenant),
            "users": await store.list_users(tenant),
            "audit": await store.audit_log(tenant, 10_000),
            "stored": await store.stored_bytes(tenant),
            "settings": await registry.tenants.get_tenant(tenant)
            if await registry.data._command("EXISTS", f"slipstream:{{{tenant}}}:settings")
            else None,
            "usage": await registry.tenants.usage(tenant, today, today),
            "files": await registry.jobs.list_files(tenant, page),
            "jobs": [(job, await registry.jobs.list_events(tenant, job.id, page)) for job in jobs],
            "imports": [(each, await registry.imports.parts(tenant, each.id)) for each in imports],
            "webhooks": [(hook, await registry.webhooks.last(tenant, hook.id)) for hook in hooks],
            "pending": [await registry.webhooks.pending(tenant, hook.id, 1000) for hook in hooks],
        }
    found["active"] = [(job.tenant, job.id) for job in await registry.jobs.active()]
    found["open"] = await registry.imports.open()
    found["due"] = await registry.imports.due()
    found["hooked"] = await registry.webhooks.tenants()
    return found


async def usage_end(registry: Registry) -> float:
    """When a tenant's usage of this month will be forgotten, in ms since the epoch; a fraction of a second may get lost."""
    keys = [f"slipstream:{{{tenant}}}:usage:{utc_now():%Y-%m}" for tenant in TENANTS]
    found = [item for key in keys for item in (await registry.data.read([key])).values()]
    return min(item.expires_at_ms for item in found if item.expires_at_ms is not None)


@EVERYWHERE
@pytest.mark.parametrize("seed", range(4))
async def test_what_comes_back_is_what_was_there(registry: Registry, place: BackupPlace, seed: int) -> None:
    await fill(registry, seed)
    assert await find_problems(registry.data, registry.blobs) == []
    before, items, usage_ends = await seen(registry), await registry.all_items(), await usage_end(registry)
    manifest = await save(registry, place)
    assert await seen(registry) == before, "a backup changes nothing"
    await registry.wipe()
    assert await bring_back(registry, place) == manifest
    assert await seen(registry) == before
    assert await registry.all_items() == items
    assert abs(await usage_end(registry) - usage_ends) < 1000
    assert await find_problems(registry.data, registry.blobs) == []
    for tenant in TENANTS:
        for adapter in before[tenant]["adapters"]:
            for version in adapter.versions:
                for each in (*version.files, *version.attachments):
                    assert len(await registry.blobs.get_bytes(tenant, each.sha256)) == each.size


@ONE_SERVER
@pytest.mark.parametrize("seed", range(3))
async def test_what_was_made_after_the_look_at_all_keys_is_found_by_what_leads_there(
    registry: Registry, seed: int
) -> None:
    await fill(registry, seed)
    keys = await registry.data.keys()
    for tenant in TENANTS:
        unseen, shown = [await take_snapshot(registry.data, tenant, seen) for seen in ((), keys)]
        assert {key: item.entries for key, item in unseen.items.items()} == {
            key: item.entries for key, item in shown.items.items()
        }


@ONE_SERVER
async def test_what_is_deleted_while_a_backup_reads_is_not_half_there(
    registry: Registry, place: BackupPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        await registry.publish("acme", name, "same")
        await registry.store.set_alias("acme", name, "prod", 1)
    read = registry.data.read
    calls = 0

    async def read_and_delete(keys: Any) -> Any:
        nonlocal calls
        calls += 1
        found = await read(keys)
        if calls == 1:  # the list of adapters was read, and they were not
            await registry.store.delete("acme", "sql")
        return found

    monkeypatch.setattr(registry.data, "read", read_and_delete)
    await save(registry, place)
    monkeypatch.undo()
    await registry.wipe()
    await bring_back(registry, place)
    assert [adapter.name for adapter in await registry.store.list("acme")] == ["a.b-c", "chat"]
    assert await find_problems(registry.data, registry.blobs) == []
    assert (await registry.publish("acme", "sql", "new")).version == 2


@ONE_SERVER
async def test_a_version_that_is_published_after_a_restore_has_a_number_of_its_own(
    registry: Registry, place: BackupPlace
) -> None:
    for content in ("one", "two"):
        await registry.publish("acme", "sql", content)
    await registry.store.delete("acme", "sql", 2)
    await save(registry, place)
    await registry.wipe()
    await bring_back(registry, place)
    assert (await registry.publish("acme", "sql", "three")).version == 3


@ONE_SERVER
async def test_long_keys_go_in_parts(registry: Registry, place: BackupPlace) -> None:
    await registry.publish("acme", "sql", "one")
    await registry.store.set_alias("acme", "sql", "prod", 1)
    move = (await registry.data._command("LRANGE", "slipstream:{acme}:adapter:sql:moves", "0", "0"))[0]
    fill_up = """for i = 1, 2500 do
      redis.call('RPUSH', KEYS[1], ARGV[1])
      redis.call('XADD', KEYS[2], '*', 'by', 'key_' .. i, 'action', 'alias.moved', 'subject', 'sql@prod', 'detail', '')
      redis.call('HSET', KEYS[3], 'adapter-' .. i, i)
    end"""
    keys = [f"slipstream:{{acme}}:{name}" for name in ("adapter:sql:moves", "audit", "numbers")]
    await registry.data._command("EVAL", fill_up, "3", *keys, move)
    before = await registry.all_items()
    await save(registry, place)
    await registry.wipe()
    await bring_back(registry, place)
    assert await registry.all_items() == before
    assert len(await registry.store.alias_moves("acme", "sql")) == 2501
    assert len(await registry.store.audit_log("acme", 10_000)) == 2502


@ONE_SERVER
async def test_a_second_backup_copies_only_what_is_new(registry: Registry, place: BackupPlace, tmp_path: Path) -> None:
    await registry.publish("acme", "sql", "one")
    first = await save(registry, place)
    for sha256 in [found async for found in place.blobs.list("acme")]:
        path = tmp_path / "backups/blobs/acme/blobs" / sha256[:2] / sha256
        os.utime(path, (1, 1))
    await registry.publish("acme", "sql", "two")
    second = await save(registry, place)
    touched = [
        path.name for path in (tmp_path / "backups/blobs").rglob("*") if path.is_file() and path.stat().st_mtime > 1
    ]
    assert sha("two") in touched
    assert sha("one") not in touched
    assert await place.ids() == [first.id, second.id]
    await registry.wipe()
    await bring_back(registry, place, id_=first.id)
    assert [version.version for version in (await registry.store.get("acme", "sql")).versions] == [1]


@ONE_SERVER
async def test_while_others_write_each_backup_is_whole(registry: Registry, tmp_path: Path) -> None:
    """Publishers, aliases, deletes, keys and jobs go on; what was acknowledged before a backup began is in it."""
    done = asyncio.Event()
    published: list[int] = []

    async def publisher() -> None:
        while not done.is_set():
            version = await registry.publish("acme", "sql", f"weights {len(published)}")
            published.append(version.version)
            await registry.store.set_alias("acme", "sql", "prod", version.version, "key_1")
            if version.version > 5:
                await registry.store.delete("acme", "sql", version.version - 5)

    async def others(seed: int) -> None:
        while not done.is_set():
            await fill(registry, seed, steps=10)
            seed += 10

    tasks = [asyncio.create_task(work) for work in (publisher(), others(100))]
    places: list[tuple[BackupPlace, int]] = []
    try:
        for turn in range(4):
            while len(published) < 5 * (turn + 1):
                assert not any(task.done() for task in tasks)
                await asyncio.sleep(0.01)
            newest = published[-1]
            places.append((BackupPlace.from_url(str(tmp_path / f"b{turn}"), make=True), newest))
            await save(registry, places[-1][0])
    finally:
        done.set()
        await asyncio.gather(*tasks)
    for place, newest in places:
        await registry.wipe()
        await bring_back(registry, place)
        assert await find_problems(registry.data, registry.blobs) == []
        found = await registry.store.get("acme", "sql")
        assert found.versions[0].version >= newest
        assert found.aliases["prod"] in {version.version for version in found.versions}
        assert (await registry.store.alias_moves("acme", "sql"))[0].version == found.aliases["prod"]


@ONE_SERVER
async def test_what_is_swept_while_its_blobs_are_copied_is_not_missed(
    registry: Registry, place: BackupPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in ("one", "two"):
        await registry.publish("acme", "sql", content)
    fetch = registry.blobs.fetch_file

    async def sweep_first(tenant: str, sha256: str, destination: Path) -> None:
        monkeypatch.undo()
        await registry.store.delete("acme", "sql", 1)
        for swept in await registry.store.begin_sweep("acme", 0):  # at once, where a gateway waits an hour
            await registry.blobs.delete("acme", swept)
        await fetch(tenant, sha256, destination)

    monkeypatch.setattr(registry.blobs, "fetch_file", sweep_first)
    manifest = await save(registry, place)
    assert manifest.tenants[0].versions == 1
    assert await verify(place) == manifest


@ONE_SERVER
async def test_a_job_that_ran_is_found_by_the_rounds_and_holds_its_place(
    registry: Registry, place: BackupPlace
) -> None:
    await fill(registry, 3, steps=120)
    running = [job for job in await registry.jobs.active() if job.attempt]
    waiting = [job for job in await registry.jobs.active() if not job.attempt]
    assert running
    assert waiting
    await save(registry, place)
    await registry.wipe()
    await bring_back(registry, place)
    async with registry_at(registry.url, registry.folder) as again:
        assert {job.id for job in await again.jobs.active()} == {job.id for job in (*running, *waiting)}
        assert await again.jobs.take_slot(running[0], 1)
        assert not await again.jobs.take_slot(waiting[0], len(running))


@ONE_SERVER
async def test_the_readmes_user_may_back_up_and_restore(registry: Registry, place: BackupPlace) -> None:
    rights = ["~slipstream:*", "+@read", "+@write", "+@scripting", "+@connection", "+time", "+select"]
    rights += ["-@admin", "-@dangerous", "+cluster|slots"]
    await fill(registry, 1)
    await registry.data._command("ACL", "SETUSER", "slipstream", "on", ">pw", *rights)
    url = "redis://slipstream:pw@" + registry.url.rpartition("@")[2]
    before = await registry.all_items()
    data = RegistryData.from_url(url)
    try:
        await back_up(data, registry.blobs, place)
        await Restore(data, registry.blobs, place).run(replace=True)
    finally:
        await data.close()
    assert await registry.all_items() == before


@ONE_SERVER
async def test_a_bucket_is_a_place_as_well(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_s3() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        place = BackupPlace.from_url(f"s3://{BUCKET}/backups/slipstream")
        await registry.publish("acme", "sql", "one")
        before = await registry.all_items()
        first = await save(registry, place)
        second = await save(registry, place)
        await registry.wipe()
        assert await bring_back(registry, place) == second
        assert await registry.all_items() == before
        assert await prune(place, 1) == ([first.id], 0)
        assert await verify(place) == second


@ONE_SERVER
async def test_a_tenant_called_jobs_has_no_hand_in_all_tenants_jobs(registry: Registry) -> None:
    """Its requests in flight were once written down where all jobs that have not ended are."""
    await fill(registry, 3)
    active = await registry.jobs.active()
    assert active
    await registry.tenants.admit("jobs", "a request", 1)
    jobs = RedisJobs.from_url(registry.url)
    try:
        assert await jobs.active() == active
        assert await jobs._command("ZSCORE", "slipstream:{jobs}:active", "a request") is None
    finally:
        await jobs.close()


@ONE_SERVER
async def test_files_that_two_records_share_are_counted_twice(registry: Registry, place: BackupPlace) -> None:
    await registry.put("acme", "same")
    for _ in range(2):
        await registry.jobs.add_file(rows("same"))
    await save(registry, place)
    await registry.wipe()
    await bring_back(registry, place)
    one, two = (await registry.jobs.list_files("acme", PageQuery())).items
    await registry.jobs.delete_file("acme", one.id)
    assert await registry.store.begin_sweep("acme", 0) == []
    await registry.jobs.delete_file("acme", two.id)
    assert list(await registry.store.begin_sweep("acme", 0)) == [sha("same")]
    store = RedisStore.from_url(registry.url)
    with pytest.raises(NotPublished):
        await store.resolve("acme", parse_reference("sql"))
    await store.close()
    assert await registry.data._command("GET", SCHEMA_KEY) == str(SCHEMA)
