"""Bringing a registry back from a backup, and looking whether a backup, or a registry, is whole."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from adapter_registry.backup.kinds import kind_of
from adapter_registry.backup.parallel import for_each
from adapter_registry.backup.place import BackupPlace
from adapter_registry.backup.records import Item, Manifest
from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.backup.snapshot import Snapshot, take_snapshot
from adapter_registry.backup.writing import Told, copy_blob, discard, read_snapshot
from adapter_registry.errors import BackupInvalid, BlobCorrupt, BlobMissing, RegistryNotEmpty
from adapter_registry.imports import ImportRecord
from adapter_registry.jobs import JobState
from adapter_registry.migrations import SCHEMA
from adapter_registry.records import check_name, utc_now
from adapter_registry.redis_connection import RESTORING
from adapter_registry.redis_imports import DUE_KEY, OPEN_KEY
from adapter_registry.redis_jobs import ACTIVE_KEY, SLOTS_KEY
from adapter_registry.redis_store import SHARED_LISTED
from adapter_registry.redis_webhooks import HOOKED_KEY
from adapter_registry.scripts import CHANGES_KEY, PUBLIC_KEY, TENANTS_KEY, TenantKeys
from adapter_registry.store import BlobStore

_SHOWN = 5
_LOOKS = 3


class Restore:
    """One restore. `data` and `blobs` are the registry that is filled; nothing else may use it meanwhile."""

    def __init__(
        self,
        data: RegistryData,
        blobs: BlobStore,
        place: BackupPlace,
        tell: Told = lambda *_: None,
        *,
        at_once: int = 8,
    ) -> None:
        self._data = data
        self._blobs = blobs
        self._place = place
        self._tell = tell
        self._at_once = at_once

    async def run(self, id_: str | None = None, *, replace: bool = False, trust_blobs: bool = False) -> Manifest:
        """Fill the registry from a backup, or the newest. Returns its manifest.

        All of the backup is read and every blob is in the blob store before anything is removed or written in Redis.
        `replace` removes what the registry holds; `trust_blobs` does not read blobs that are in the blob store already.
        From the first write to the last the registry's schema says that it is not whole, so no gateway that starts will use
        it; a restore that was broken off is begun again by the next. Raises `RegistryNotEmpty`, `BackupInvalid` and
        `StoreUnavailable`.
        """
        manifest = await self._place.manifest(id_)
        if manifest.schema_version > SCHEMA:
            raise BackupInvalid(
                f"This backup has schema {manifest.schema_version} and this Slipstream reads schema {SCHEMA}: restore it "
                "with the version of Slipstream that wrote it, or a newer one."
            )
        await self._room(replace=replace)
        for number, entry in enumerate(manifest.tenants):
            self._tell("tenants read", number, len(manifest.tenants))
            snapshot = read_snapshot(entry, await self._place.records(manifest.id, entry.tenant))
            await self._bring_blobs(snapshot, trust_blobs=trust_blobs)
        found = await self._room(replace=replace)  # blobs take hours: it may be another's by now
        await self._data.set_schema(RESTORING)
        await for_each(sorted(found), self._data.remove, self._at_once)
        for number, entry in enumerate(manifest.tenants):
            self._tell("tenants written", number, len(manifest.tenants))
            snapshot = read_snapshot(entry, await self._place.records(manifest.id, entry.tenant))
            await self._write(snapshot)
        await self._look(manifest)
        await self._data.set_schema(str(manifest.schema_version))
        self._tell("tenants written", len(manifest.tenants), len(manifest.tenants))
        return manifest

    async def _room(self, *, replace: bool) -> set[str]:
        """What must go first. Raises `RegistryNotEmpty`."""
        found = await self._data.keys()
        holding = sorted({placed.tenant for key in found if (placed := kind_of(key)) and placed.tenant})
        if found - {CHANGES_KEY} and not replace and not await self._data.is_restoring():
            whose = f" of {len(holding)} tenants ({', '.join(holding[:_SHOWN])})" if holding else ""
            raise RegistryNotEmpty(
                f"The registry is not empty: it holds {len(found)} keys{whose}. A restore replaces all of it: back it up "
                "first if it is worth anything, and then restore with --replace."
            )
        return found

    async def _bring_blobs(self, snapshot: Snapshot, *, trust_blobs: bool) -> None:
        tenant, done = snapshot.tenant, 0
        there = {sha async for sha in self._blobs.list(tenant)}
        with tempfile.TemporaryDirectory(prefix="slipstream-restore-") as folder:

            async def bring(sha: str) -> None:
                nonlocal done
                if sha not in there or not (
                    trust_blobs or await is_whole(self._blobs, tenant, sha, Path(folder) / sha)
                ):
                    await self._blobs.delete(tenant, sha)
                    try:
                        await copy_blob(self._place.blobs, self._blobs, tenant, sha, Path(folder) / sha)
                    except (BlobMissing, BlobCorrupt) as error:
                        raise _bad_blob(snapshot, sha) from error
                done += 1
                self._tell(f"blobs of {tenant}", done, len(snapshot.named_by))

            await for_each(sorted(snapshot.named_by), bring, self._at_once)

    async def _write(self, snapshot: Snapshot) -> None:
        """A tenant's keys, and what indexes of all tenants say of it."""
        await for_each([*snapshot.kept, *snapshot.counted()], self._data.write, self._at_once)
        tenant = snapshot.tenant
        indexes: defaultdict[str, list[str]] = defaultdict(list)
        for name, access in snapshot.access().items():
            for index in (*(TenantKeys(other).shared for other in access.tenants), *([PUBLIC_KEY] * access.public)):
                indexes[index].append(f"{tenant}/{name}")
        jobs = [job for job in snapshot.jobs if not job.state.is_terminal]
        started = [job for job in jobs if job.attempt or job.state is not JobState.QUEUED]
        indexes[SLOTS_KEY] += [f"{tenant}/{job.id}" for job in started]
        texts = (text.partition(" ")[2] for text in snapshot.hash("imports").values())
        imports = [record for record in map(ImportRecord.model_validate_json, texts) if not record.has_ended]
        indexes[OPEN_KEY] += [f"{tenant}/{record.id}" for record in imports]
        indexes[DUE_KEY] += [f"{tenant}/{record.id}" for record in imports if record.is_due]
        indexes[HOOKED_KEY] += [tenant] * bool(snapshot.members("webhooks"))
        indexes[TENANTS_KEY].append(tenant)
        for job in jobs:
            since_ms = int(job.created_at.timestamp() * 1000)
            await self._data.rank(ACTIVE_KEY, f"{tenant}/{job.id}", since_ms)
        for index, members in indexes.items():
            listed = index == PUBLIC_KEY or index.endswith(":shared")
            await self._data.add(index, members[:SHARED_LISTED] if listed else members)

    async def _look(self, manifest: Manifest) -> None:
        """Whether what is there now is what the backup says."""
        for entry in manifest.tenants:
            wanted = read_snapshot(entry, await self._place.records(manifest.id, entry.tenant))
            found = await take_snapshot(self._data, entry.tenant, wanted.items, to_compare=True)
            now_ms = utc_now().timestamp() * 1000
            missing = [
                item.key
                for item in wanted.kept
                if not _is_same(item, found.items.get(item.key))
                and (item.expires_at_ms is None or item.expires_at_ms > now_ms)
            ]
            if missing or (problems := found.problems()):
                raise BackupInvalid(
                    f"The records of {entry.tenant} are not what the backup holds ({(missing or problems)[0]}): nothing may "
                    "use the registry during a restore. Stop what does, and restore again."
                )


def _is_same(item: Item, found: Item | None) -> bool:
    return found is not None and (found.type, found.entries) == (item.type, item.entries)


async def verify(
    place: BackupPlace, id_: str | None = None, tell: Told = lambda *_: None, *, at_once: int = 8
) -> Manifest:
    """Read all of a backup, or of the newest, and check every hash. Raises `BackupInvalid`."""
    manifest = await place.manifest(id_)
    for entry in manifest.tenants:
        snapshot = read_snapshot(entry, await place.records(manifest.id, entry.tenant))
        done = 0
        with tempfile.TemporaryDirectory(prefix="slipstream-verify-") as folder:

            async def look(sha: str, snapshot: Snapshot = snapshot, folder: str = folder) -> None:
                nonlocal done
                if not await is_whole(place.blobs, snapshot.tenant, sha, Path(folder) / sha):
                    raise _bad_blob(snapshot, sha)
                done += 1
                tell(f"blobs of {snapshot.tenant}", done, len(snapshot.named_by))

            await for_each(sorted(snapshot.named_by), look, at_once)
    return manifest


async def find_problems(data: RegistryData, blobs: BlobStore) -> list[str]:
    """What does not agree in a registry, sentence by sentence; nothing is changed.

    A tenant is not read at one moment, so what somebody is just doing may look like a problem: what is told was seen
    in each of several looks.
    """
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for key in await data.keys():
        if (placed := kind_of(key)) and placed.tenant is not None:
            seen[placed.tenant].add(key)
    problems = []
    for tenant in sorted(seen):
        found = await _problems_of(data, blobs, tenant, seen[tenant])
        for _ in range(_LOOKS - 1):
            if found:
                again = set(await _problems_of(data, blobs, tenant, seen[tenant]))
                found = [problem for problem in found if problem in again]
        problems += found
    return problems


async def _problems_of(data: RegistryData, blobs: BlobStore, tenant: str, seen: Iterable[str]) -> list[str]:
    snapshot = await take_snapshot(data, tenant, seen, to_compare=True)
    there = {sha async for sha in blobs.list(check_name(tenant, "tenant"))}
    gone = [
        f"{tenant}: {by[0]} names blob {sha}, which is not in the blob store"
        for sha, by in sorted(snapshot.named_by.items())
        if sha not in there
    ]
    return [*snapshot.problems(), *gone]


async def is_whole(blobs: BlobStore, tenant: str, sha256: str, through: Path) -> bool:
    """Whether a blob is there with the content that its name says."""
    try:
        await blobs.fetch_file(tenant, sha256, through)
    except (BlobMissing, BlobCorrupt):
        return False
    finally:
        discard(through)
    return True


def _bad_blob(snapshot: Snapshot, sha: str) -> BackupInvalid:
    by = ", ".join(snapshot.named_by[sha][:_SHOWN])
    return BackupInvalid(
        f"The backup's blob {sha} of the tenant {snapshot.tenant} ({by}) is missing or damaged: use another place, or an "
        "older backup that does not name it."
    )
