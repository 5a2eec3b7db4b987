"""From one schema of the registry's data to the next, in place.

A step may run while others already write the new schema, and twice: each changes only what is not yet as it should be.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from adapter_registry.records import FileEntry, canonical_manifest
from adapter_registry.scripts import TENANTS_KEY, TenantKeys, load_script

SCHEMA = 2
Execute = Callable[..., Awaitable[Any]]  # one Redis command, in words
_BATCH = 500  # blobs noted in one script: it blocks the whole server while it runs


async def note_sizes(execute: Execute) -> None:
    """1 → 2: what each blob in use weighs, and each tenant's sum of it, which quotas of storage are held against."""
    for tenant in await execute("SMEMBERS", TENANTS_KEY):
        await count_sizes(execute, tenant)


async def count_sizes(execute: Execute, tenant: str) -> None:
    """Of one tenant, anew; also what mends them after a gateway of an older version has changed references without them."""
    recount = load_script("recount")
    keys, sizes = TenantKeys(tenant), dict[str, int]()
    for name in await execute("SMEMBERS", keys.names):
        for envelope in await execute("HVALS", keys.adapter(name).versions):
            sizes |= blob_sizes(json.loads(envelope))
    for record in await execute("HVALS", keys.files):
        file = json.loads(record)
        sizes[file["sha256"]] = file["size"]
    pairs = sorted(sizes.items())
    for i in range(0, len(pairs) or 1, _BATCH):
        words = [word for pair in pairs[i : i + _BATCH] for word in pair]
        await execute("EVAL", recount, 2, keys.refs, keys.sizes, *words)


def blob_sizes(envelope: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of every blob that a version refers to, by sha256, from the version as it is stored."""
    record = envelope["record"]
    named = {entry["sha256"]: int(entry["size"]) for entry in (*record["files"], *record["attachments"])}
    manifest = canonical_manifest(FileEntry.model_validate(entry) for entry in record["files"])
    return named | {envelope["digest"].removeprefix("sha256:"): len(manifest)}


STEPS: Mapping[int, Callable[[Execute], Awaitable[None]]] = {1: note_sizes}  # from schema → to the next
