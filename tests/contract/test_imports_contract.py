"""One suite for every `ImportStore`: adapters on their way in, part by part."""

from __future__ import annotations

import asyncio

import pytest
from support.drafts import draft, entry, publish, sha

from adapter_registry import imports as module
from adapter_registry.errors import BlobMissing, InUse, NotPublished
from adapter_registry.imports import (
    IMPORT_PREFIX,
    PART_BYTES,
    ImportEnded,
    ImportFault,
    ImportRecord,
    ImportStore,
    part_count,
    part_size,
)
from adapter_registry.jobs import PageQuery, new_id
from adapter_registry.records import VersionState, VersionWish, utc_now
from adapter_registry.store import Store


def record(tenant: str = "acme", name: str = "sql") -> ImportRecord:
    return ImportRecord(
        id=new_id(IMPORT_PREFIX), tenant=tenant, name=name, files=(entry("adapter_config.json", "config"),),
        wish=VersionWish(labels={"team": "search"}), created_by="key_1", created_at=utc_now(),
    )  # fmt: skip


def rejected(found: ImportRecord) -> ImportRecord:
    return found.changed(state=VersionState.REJECTED, fault=ImportFault(code="bad_json", message="No JSON."))


async def put(store: Store, imports: ImportStore, made: ImportRecord, index: int, content: str) -> None:
    await store.claim_blobs(made.tenant, [sha(content)])
    await imports.put_part(made.tenant, made.id, "adapter_config.json", index, sha(content))


async def test_what_is_kept_is_read_again(imports: ImportStore) -> None:
    made, other = record(), record("globex")
    await imports.add(made)
    await imports.add(made)  # a retry
    await imports.add(other)
    assert await imports.get("acme", made.id) == made
    assert [each.id for each in await imports.open()] == [each.id for each in sorted([made, other], key=_by_tenant)]
    assert (await imports.list("acme", PageQuery())).items == [made]
    for tenant, import_id in (("globex", made.id), ("acme", "imp-none")):
        with pytest.raises(NotPublished):
            await imports.get(tenant, import_id)
    with pytest.raises(NotPublished):
        await imports.list("acme", PageQuery(after=other.id))


def _by_tenant(each: ImportRecord) -> tuple[str, str]:
    return each.tenant, each.id


async def test_parts_are_held_until_it_ends(store: Store, imports: ImportStore) -> None:
    made = record()
    await imports.add(made)
    with pytest.raises(BlobMissing):
        await imports.put_part("acme", made.id, "adapter_config.json", 0, sha("never claimed"))
    await put(store, imports, made, 0, "zero")
    await put(store, imports, made, 1, "one")
    await put(store, imports, made, 1, "one")  # again: nothing changes
    await put(store, imports, made, 0, "another zero")  # instead of the first
    assert await imports.parts("acme", made.id) == {
        ("adapter_config.json", 0): sha("another zero"), ("adapter_config.json", 1): sha("one"),
    }  # fmt: skip
    assert await store.stored_bytes("acme") == 0  # nothing is published yet
    assert await store.begin_sweep("acme", 0) == [sha("zero")]
    await store.end_sweep("acme", [sha("zero")])
    await imports.update("acme", made.id, rejected)
    assert await imports.parts("acme", made.id) == {}
    assert sorted(await store.begin_sweep("acme", 0)) == sorted([sha("another zero"), sha("one")])
    assert await imports.open() == []


async def test_a_part_that_is_a_version_s_file_stays(store: Store, imports: ImportStore) -> None:
    """The smallest files are one part, and so one blob with the version's."""
    made, version = record(), draft("a")
    await imports.add(made)
    await put(store, imports, made, 0, "config")
    published = await publish(store, version)
    weight = await store.stored_bytes("acme")
    assert weight == sum(published.blob_sizes.values())
    await imports.update("acme", made.id, lambda found: found.changed(state=VersionState.READY, version="sql@1"))
    assert await store.begin_sweep("acme", 0) == []
    assert await store.stored_bytes("acme") == weight
    await store.delete("acme", "sql")
    assert await store.stored_bytes("acme") == 0
    assert len(await store.begin_sweep("acme", 0)) == 3


async def test_the_last_to_hold_a_blob_takes_its_weight_along(store: Store, imports: ImportStore) -> None:
    made = record()
    await imports.add(made)
    await put(store, imports, made, 0, "config")
    await publish(store, draft("a"))
    await store.delete("acme", "sql")  # while the import goes on
    assert sha("config") not in await store.begin_sweep("acme", 0)
    await imports.update("acme", made.id, rejected)
    assert await store.stored_bytes("acme") == 0
    assert await store.begin_sweep("acme", 0) != []


async def test_nothing_is_added_to_one_that_has_all_or_has_ended(store: Store, imports: ImportStore) -> None:
    made = record()
    await imports.add(made)
    assert await imports.due() == []
    full = await imports.update("acme", made.id, lambda found: found.changed(state=VersionState.VALIDATING))
    assert await imports.due() == [full]
    assert full.state is VersionState.VALIDATING
    with pytest.raises(ImportEnded, match="validating"):
        await put(store, imports, made, 0, "late")
    ended = await imports.update("acme", made.id, rejected)
    assert await imports.due() == await imports.open() == []
    assert await imports.get("acme", made.id) == ended
    pulled = record().changed(files=(), source="hf://owner/name")
    await imports.add(pulled)
    assert await imports.due() == [pulled]
    with pytest.raises(ImportEnded, match="rejected"):
        await imports.update("acme", made.id, rejected)
    with pytest.raises(NotPublished):
        await imports.put_part("globex", made.id, "adapter_config.json", 0, sha("late"))
    with pytest.raises(NotPublished):
        await imports.update("globex", made.id, rejected)


async def test_of_many_who_change_it_at_once_none_is_forgotten(imports: ImportStore) -> None:
    made = record()
    await imports.add(made)

    async def once() -> None:
        await imports.update("acme", made.id, lambda found: found.changed(attempts=found.attempts + 1))

    await asyncio.gather(*(once() for _ in range(20)))
    assert (await imports.get("acme", made.id)).attempts == 20


async def test_there_is_a_bound_to_those_that_are_open_and_to_those_that_are_kept(
    imports: ImportStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("adapter_registry.redis_imports", "slipstream.testing.memory_imports"):
        monkeypatch.setattr(f"{name}.MAX_OPEN", 3)
        monkeypatch.setattr(f"{name}.IMPORTS_KEPT", 4)
    first = record()
    await imports.add(first)
    for _ in range(6):
        made = record()
        await imports.add(made)
        await imports.update("acme", made.id, rejected)
    kept = (await imports.list("acme", PageQuery())).items
    assert len(kept) == 4
    assert kept[-1] == first, "an open one is never dropped"
    for _ in range(2):
        await imports.add(record())
    with pytest.raises(InUse, match=str(module.MAX_OPEN)):
        await imports.add(record())
    await imports.add(record("globex"))


def test_files_are_cut_into_parts() -> None:
    assert [part_count(size) for size in (0, 1, PART_BYTES, PART_BYTES + 1)] == [0, 1, 1, 2]
    assert part_size(PART_BYTES + 1, 0) == PART_BYTES
    assert part_size(PART_BYTES + 1, 1) == 1
