"""Making a backup while the registry is in use, and removing old ones."""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from adapter_registry.backup.kinds import kind_of
from adapter_registry.backup.parallel import for_each
from adapter_registry.backup.place import BackupPlace
from adapter_registry.backup.records import FORMAT, ID_FORMAT, Manifest, TenantFile, decode_items, encode_items
from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.backup.snapshot import Snapshot, take_snapshot
from adapter_registry.errors import BackupIncomplete, BlobCorrupt, BlobMissing
from adapter_registry.migrations import SCHEMA
from adapter_registry.records import check_name, utc_now
from adapter_registry.scripts import TENANTS_KEY
from adapter_registry.store import BlobStore

Told = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much
_TRIES = 3  # of a tenant: what was deleted and swept while its blobs were copied is not named the next time
_SHOWN = 5


async def back_up(
    data: RegistryData, blobs: BlobStore, place: BackupPlace, tell: Told = lambda *_: None, *, at_once: int = 8
) -> Manifest:
    """Back the registry up, while it is in use; nothing in it is changed. Returns the manifest.

    Each adapter's records are of one moment; adapters and tenants are read one after the other. A blob that `place` has
    already is not copied again. Raises `BackupIncomplete` when a blob that records name is not in the blob store, and
    `StoreUnavailable`. Unless this returns there is no backup, whatever was written.
    """
    schema = await _readable_schema(data)
    seen = _by_tenant(await data.keys())
    started = utc_now()
    id_ = started.strftime(ID_FORMAT)
    tenants = sorted(seen.keys() | set(await data.members(TENANTS_KEY)))
    files = []
    for number, tenant in enumerate(tenants):
        tell("tenants", number, len(tenants))
        snapshot = await _with_its_blobs(data, blobs, place, tenant, seen.get(tenant, ()), tell=tell, at_once=at_once)
        file = encode_items(snapshot.kept)
        await place.put_records(id_, tenant, file)
        files.append(_entry(snapshot, file))
    tell("tenants", len(tenants), len(tenants))
    manifest = Manifest(format=FORMAT, id=id_, schema_version=schema, created_at=started, tenants=tuple(files))
    await place.finish(manifest)
    return manifest


async def prune(place: BackupPlace, keep: int) -> tuple[Sequence[str], int]:
    """Remove all but the newest `keep` backups, what is left of broken-off ones, and blobs that no backup names any more.

    Returns the ids of the backups removed and the number of blobs. Nothing else may write to `place` meanwhile. Raises
    `BackupInvalid` before anything is removed when a backup that stays cannot be read.
    """
    whole = await place.ids()
    staying, going = whole[-keep:], [*whole[:-keep], *await place.unfinished()]
    named: defaultdict[str, set[str]] = defaultdict(set)
    for id_ in staying:
        manifest = await place.manifest(id_)
        for entry in manifest.tenants:
            named[entry.tenant] |= set(read_snapshot(entry, await place.records(id_, entry.tenant)).named_by)
    for id_ in going:
        await place.remove(id_)
    removed = 0
    for tenant in await place.tenants_with_blobs():
        for sha in [sha async for sha in place.blobs.list(check_name(tenant, "tenant")) if sha not in named[tenant]]:
            await place.blobs.delete(tenant, sha)
            removed += 1
    return going, removed


def read_snapshot(entry: TenantFile, file: bytes) -> Snapshot:
    """A tenant's records out of a backup. Raises `BackupInvalid`."""
    return Snapshot(entry.tenant, {item.key: item for item in decode_items(entry.tenant, file, entry)})


async def _readable_schema(data: RegistryData) -> int:
    found = await data.schema()
    if await data.is_restoring():
        raise BackupIncomplete(
            "The registry is in the middle of a restore: run `slipstream registry restore` to its end."
        )
    if not found.isdigit() or int(found) > SCHEMA:
        raise BackupIncomplete(
            f"The registry's data has schema {found[:20]!r} and this Slipstream reads schema {SCHEMA}: back it up with the "
            "version that serves it."
        )
    return int(found)


def _by_tenant(keys: Iterable[str]) -> dict[str, set[str]]:
    """Each tenant's keys. Raises `BackupIncomplete` for keys that nobody has decided about."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    unknown = []
    for key in keys:
        placed = kind_of(key)
        if placed is None:
            unknown.append(key[:120])
        elif placed.tenant is not None:
            found[placed.tenant].add(key)
    if unknown:
        some = ", ".join(sorted(unknown)[:_SHOWN])
        raise BackupIncomplete(
            f"The registry holds {len(unknown)} keys that this Slipstream does not know ({some}): back it up "
            "with the version that serves it, or remove them if nothing of Slipstream's wrote them."
        )
    return dict(found)


async def _with_its_blobs(
    data: RegistryData,
    blobs: BlobStore,
    place: BackupPlace,
    tenant: str,
    seen: Iterable[str],
    *,
    tell: Told,
    at_once: int,
) -> Snapshot:
    """A tenant's records, when all blobs that they name are in `place`."""
    lost: dict[str, str] = {}
    for _ in range(_TRIES):
        snapshot = await take_snapshot(data, tenant, seen)
        lost = await _copy_blobs(blobs, place, snapshot, tell, at_once)
        if not lost:
            return snapshot
    about = {f"{by} ({lost[sha]})" for sha in lost for by in snapshot.named_by.get(sha, ())[:1]}
    raise BackupIncomplete(
        f"{len(lost)} blobs of the tenant {tenant} cannot be backed up: {', '.join(sorted(about)[:_SHOWN])}. Put them back "
        "into the blob store, or delete what names them, and back up again."
    )


async def _copy_blobs(
    blobs: BlobStore, place: BackupPlace, snapshot: Snapshot, tell: Told, at_once: int
) -> dict[str, str]:
    """Copy those that the place does not have; returns those that cannot be, and why."""
    tenant = snapshot.tenant
    there = {sha async for sha in place.blobs.list(tenant)}
    wanted = sorted(snapshot.named_by.keys() - there)
    lost: dict[str, str] = {}
    done = 0
    with tempfile.TemporaryDirectory(prefix="slipstream-backup-") as folder:

        async def copy(sha: str) -> None:
            nonlocal done
            try:
                await copy_blob(blobs, place.blobs, tenant, sha, Path(folder) / sha)
            except BlobMissing:
                lost[sha] = "missing"
            except BlobCorrupt:
                lost[sha] = "damaged"
            done += 1
            tell(f"blobs of {tenant}", done, len(wanted))

        await for_each(wanted, copy, at_once)
    return lost


async def copy_blob(source: BlobStore, target: BlobStore, tenant: str, sha256: str, through: Path) -> None:
    """From one store to another; its hash is checked on the way. Raises `BlobMissing` and `BlobCorrupt`."""
    try:
        await source.fetch_file(tenant, sha256, through)
        await target.put_file(tenant, sha256, through)
    finally:
        discard(through)


def discard(path: Path) -> None:
    """Remove a file that may not be there."""
    path.unlink(missing_ok=True)


def _entry(snapshot: Snapshot, file: bytes) -> TenantFile:
    return TenantFile(
        tenant=snapshot.tenant,
        sha256=hashlib.sha256(file).hexdigest(),
        size=len(file),
        keys=len(snapshot.kept),
        adapters=len(snapshot.adapters),
        versions=sum(map(len, snapshot.adapters.values())),
        blobs=len(snapshot.named_by),
    )
