"""What is done to a registry in processes that may die: plain functions, so that they travel to one."""

from __future__ import annotations

from support.crashing import World
from support.drafts import entry, sha

from adapter_registry.imports import IMPORT_PREFIX, ImportFault, ImportRecord
from adapter_registry.jobs import new_id
from adapter_registry.records import VersionState, utc_now
from slipstream.publishing import publish_folder, sweep_blobs
from slipstream.testing import FAKE_BASE

TENANT, NAME = "acme", "sql"


async def publish(world: World) -> object:
    """The folder, as the next version."""
    version, _ = await publish_folder(
        world.folder, NAME, TENANT, FAKE_BASE, store=world.store, blobs=world.blobs, created_by="key_1"
    )
    return version.version


async def move(world: World) -> object:
    """`prod` to version 2."""
    await world.store.set_alias(TENANT, NAME, "prod", 2, "key_1")
    return 2


async def roll_back(world: World) -> object:
    """`prod` to where it was."""
    return await world.store.roll_back_alias(TENANT, NAME, "prod", "key_1")


async def delete_version(world: World) -> object:
    """Version 1."""
    return [gone.version for gone in await world.store.delete(TENANT, NAME, 1, "key_1")]


async def delete_all(world: World) -> object:
    """All versions and aliases."""
    return [gone.version for gone in await world.store.delete(TENANT, NAME, by="key_1")]


async def sweep(world: World) -> object:
    """What nothing refers to."""
    return await sweep_blobs(world.store, world.blobs, 0.0)


async def import_and_give_up(world: World) -> object:
    """An upload of one part that ends without a version."""
    record = ImportRecord(
        id=new_id(IMPORT_PREFIX), tenant=TENANT, name=NAME, files=(entry("a.json", "part"),), created_at=utc_now()
    )
    await world.imports.add(record)
    await world.store.claim_blobs(TENANT, [sha("part")])
    await world.blobs.put_bytes(TENANT, sha("part"), b"part")
    await world.imports.put_part(TENANT, record.id, "a.json", 0, sha("part"))
    fault = ImportFault(code="given_up", message="It was given up.")
    await world.imports.update(TENANT, record.id, lambda found: found.changed(state=VersionState.REJECTED, fault=fault))
    return record.id
