"""`MemoryStore`: the registry's `Store` without Redis. It passes the same contract tests as `RedisStore`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

from adapter_registry.changes import Change
from adapter_registry.errors import BlobMissing, InUse, NotPublished, StoreUnavailable
from adapter_registry.keys import KeyRecord, UserRecord
from adapter_registry.records import (
    Access,
    AdapterDraft,
    AdapterSummary,
    AdapterVersion,
    AuditAction,
    AuditEntry,
    SpeculationPolicy,
    VersionState,
    check_audit_id,
    check_name,
    check_sha256,
    utc_now,
)
from adapter_registry.store import Store, no_such_user, no_user, storage_full
from slipstream.testing.memory_aliases import MemoryAdapter, MemoryAliases, MemoryTenant, not_published, summary_of

_CLAIM_POLL_S = 0.01


class MemoryStore(MemoryAliases, Store):
    """Records in dictionaries; between two awaits nothing else runs, so every method is atomic."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, claim_wait_s: float = 10.0, sweep_lease_s: float = 900.0
    ) -> None:
        super().__init__(clock)
        self._claim_wait_s = claim_wait_s
        self._sweep_lease_s = sweep_lease_s

    async def claim_blobs(self, tenant: str, sha256s: Iterable[str]) -> None:
        """Protect these blobs from the sweep for the grace period. Call before putting them."""
        shas = {check_sha256(sha) for sha in sha256s}
        mine = self.enter(tenant)
        deadline = asyncio.get_running_loop().time() + self._claim_wait_s
        while not shas.isdisjoint(mine.deleting):
            if asyncio.get_running_loop().time() + _CLAIM_POLL_S > deadline:
                raise StoreUnavailable("These files are being cleaned up right now; try again in a moment.")
            await asyncio.sleep(_CLAIM_POLL_S)
        for sha in shas:
            if sha not in mine.refs:
                mine.garbage[sha] = self._clock()

    async def publish(self, draft: AdapterDraft) -> tuple[AdapterVersion, bool]:
        """Make a version visible, atomically; returns it and whether it is new."""
        mine = self.enter(draft.tenant)
        adapter = mine.adapters.get(draft.name, MemoryAdapter())
        known = next((v for v in adapter.versions.values() if v.digest == draft.digest), None)
        if known:
            return known, False
        for sha in draft.blob_sha256s:
            if sha not in mine.refs and sha not in mine.garbage:  # a blob being deleted is in neither
                raise BlobMissing("Some of this version's files are not held for it any more: upload them again.")
        _check_storage(mine, draft.blob_sizes)
        mine.numbers[draft.name] += 1
        version = AdapterVersion.model_validate(
            {
                **draft.model_dump(),
                "version": mine.numbers[draft.name],
                "state": VersionState.READY,
                "created_at": utc_now(),
            }
        )
        self.write_down(draft.tenant, draft.created_by, AuditAction.VERSION_PUBLISHED, version.ref, version.digest)
        adapter.versions[version.version] = version
        mine.adapters[draft.name] = adapter
        for sha, size in draft.blob_sizes.items():
            self._hold(mine, sha, size)
        return version, True

    async def get(self, tenant: str, name: str) -> AdapterSummary:
        """One adapter with its versions and aliases. Raises `NotPublished`."""
        return summary_of(tenant, name, self._adapter(tenant, name))

    async def list(self, tenant: str) -> Sequence[AdapterSummary]:
        """All of a tenant's adapters, by name."""
        return [summary_of(tenant, name, adapter) for name, adapter in sorted(self._look(tenant).adapters.items())]

    async def delete(
        self, tenant: str, name: str, version: int | None = None, by: str = ""
    ) -> Sequence[AdapterVersion]:
        """Remove one version, or the adapter with all its versions and aliases; newest first."""
        mine, adapter = self._look(tenant), self._adapter(tenant, name)
        doomed = sorted(adapter.versions if version is None else {version} & set(adapter.versions), reverse=True)
        if not doomed:
            raise not_published(name)
        alias = next((alias for alias, number in adapter.aliases.items() if number == version), None)
        alias = alias or next((alias for alias, split in adapter.splits.items() if split.version == version), None)
        if alias is not None:
            raise InUse(f"The alias {alias!r} points at {name}@{version}: move or delete the alias first.")
        removed = [adapter.versions.pop(number) for number in doomed]
        for gone in removed:
            self.write_down(tenant, by, AuditAction.VERSION_DELETED, gone.ref, gone.digest)
        if not adapter.versions:
            del mine.adapters[name]
        for gone in removed:
            for sha in gone.blob_sha256s:
                self.release_blob(tenant, sha)
            if gone.digest.removeprefix("sha256:") not in mine.refs:
                self.tell(Change(tenant=tenant, gone=gone.digest))
        return removed

    async def set_access(self, tenant: str, name: str, access: Access, by: str = "") -> None:
        """Say who else may call an adapter; holds for the next request. Raises `NotPublished`."""
        adapter = self._adapter(tenant, name)
        if access == adapter.access:
            return
        adapter.access = access
        self.write_down(tenant, by, AuditAction.ACCESS_CHANGED, name, access.model_dump_json())

    async def shared_with(self, tenant: str) -> Sequence[AdapterSummary]:
        """Others' adapters that a tenant may call, by owner and name."""
        check_name(tenant, "tenant")
        return [
            summary_of(owner, name, adapter)
            for owner, theirs in sorted(self._tenants.items())
            for name, adapter in sorted(theirs.adapters.items())
            if owner != tenant and adapter.access.allows(tenant)
        ]

    async def set_speculation(self, tenant: str, name: str, version: int, policy: SpeculationPolicy) -> AdapterVersion:
        """Change what "auto" means for a READY version; returns the version as it is now. Raises `NotPublished`."""
        return self._change(tenant, name, version, speculation=policy)

    async def set_labels(self, tenant: str, name: str, version: int, labels: Mapping[str, str]) -> AdapterVersion:
        """Replace a READY version's labels; returns the version as it is now. Raises `NotPublished`."""
        return self._change(tenant, name, version, labels=dict(labels))

    async def stored_bytes(self, tenant: str) -> int:
        """What counts against the tenant's quota of `storage_bytes`."""
        return sum(self._look(tenant).sizes.values())

    def _change(self, tenant: str, name: str, version: int, **changes: object) -> AdapterVersion:
        adapter = self._adapter(tenant, name)
        found = adapter.versions.get(version)
        if found is None or found.state is not VersionState.READY:
            raise not_published(name)
        adapter.versions[version] = found.model_copy(update=changes)
        return adapter.versions[version]

    async def mend_sizes(self, tenant: str) -> None:
        """There is no older version to mend after."""

    async def adopt_blobs(self, tenant: str, sha256s: Iterable[str]) -> int:
        """Make garbage of those that are neither in use nor garbage already; returns how many."""
        mine = self.enter(tenant)
        found = [sha for sha in map(check_sha256, sha256s) if sha not in {*mine.refs, *mine.garbage, *mine.deleting}]
        mine.garbage.update(dict.fromkeys(found, self._clock()))
        return len(found)

    async def begin_sweep(self, tenant: str, older_than_s: float) -> Sequence[str]:
        """Mark garbage blobs older than the grace period as being deleted and return their sha256."""
        mine, now = self._look(tenant), self._clock()
        left_behind = [sha for sha, since in mine.deleting.items() if now - since >= self._sweep_lease_s]
        old = [sha for sha, since in mine.garbage.items() if now - since >= older_than_s]
        for sha in old:
            del mine.garbage[sha]
        found = left_behind + old
        mine.deleting.update(dict.fromkeys(found, now))
        return found

    async def end_sweep(self, tenant: str, sha256s: Iterable[str]) -> None:
        """The blobs returned by `begin_sweep` are gone."""
        for sha in sha256s:
            self._look(tenant).deleting.pop(check_sha256(sha), None)

    def hold_blob(self, tenant: str, sha256: str, size: int | None) -> None:
        """One more reference to a claimed blob, as a training file is; without a size it does not count against the quota.
        Raises `BlobMissing` and `StorageFull`.
        """
        mine = self.enter(tenant)
        if sha256 not in mine.refs and sha256 not in mine.garbage:
            raise BlobMissing("The file's content is not held for it any more: upload it again.")
        if size is not None:
            _check_storage(mine, {sha256: size})
        self._hold(mine, sha256, size)

    def release_blob(self, tenant: str, sha256: str) -> None:
        """One reference less; the last one leaves garbage for the sweep."""
        mine = self.enter(tenant)
        mine.refs[sha256] -= 1
        if not mine.refs[sha256]:
            del mine.refs[sha256]
            mine.sizes.pop(sha256, None)
            mine.garbage[sha256] = self._clock()

    def _hold(self, mine: MemoryTenant, sha256: str, size: int | None) -> None:
        mine.refs[sha256] += 1
        if size is not None:
            mine.sizes[sha256] = size
        mine.garbage.pop(sha256, None)

    async def tenants(self) -> Sequence[str]:
        """Every tenant that has ever published, claimed blobs or been given a key, by name."""
        return sorted(self._tenants)

    async def put_key(self, key: KeyRecord, by: str = "") -> None:
        """Keep a key."""
        mine = self.enter(key.tenant)
        keys, user = mine.keys, mine.users.get(key.user or "")
        if key.user is not None and (user is None or not user.role.includes(key.role)):
            raise no_such_user(key)
        if keys.get(key.id) != key:
            keys[key.id] = key
            self.write_down(key.tenant, by, AuditAction.KEY_CREATED, key.id, f"{key.role} {key.label}".strip())

    async def replace_key(self, key: KeyRecord, by: str = "") -> None:
        """Change a key's record, of the same secret. Raises `NotPublished` when it has been revoked."""
        if key.id not in self._look(key.tenant).keys:
            raise NotPublished(f"There is no key {key.id[:80]!r}: list the keys to see their ids.")
        self.enter(key.tenant).keys[key.id] = key
        self.write_down(key.tenant, by, AuditAction.KEY_CHANGED, key.id, f"{key.role} {key.label}".strip())

    async def find_key(self, sha256: str) -> KeyRecord | None:
        """The key whose secret has this hash."""
        check_sha256(sha256)
        keys = (key for tenant in self._tenants.values() for key in tenant.keys.values())
        return next((key for key in keys if key.sha256 == sha256), None)

    async def list_keys(self, tenant: str) -> Sequence[KeyRecord]:
        """A tenant's keys, oldest first."""
        return sorted(self._look(tenant).keys.values(), key=lambda key: (key.created_at, key.id))

    async def note_key_use(self, tenant: str, key_id: str) -> None:
        """It was used just now; unknown ones are not noted."""
        mine = self._look(tenant)
        if key_id in mine.keys:
            mine.key_uses[key_id] = utc_now().replace(second=0, microsecond=0)

    async def key_uses(self, tenant: str) -> Mapping[str, datetime]:
        """When each of a tenant's keys was last used, to the minute, for those that were."""
        return dict(self._look(tenant).key_uses)

    async def delete_key(self, tenant: str, key_id: str, by: str = "") -> None:
        """Revoke. Raises `NotPublished` when there is none of this id."""
        mine = self._look(tenant)
        mine.key_uses.pop(key_id, None)
        key = mine.keys.pop(key_id, None)
        if key is None:
            raise NotPublished(f"There is no key {key_id[:80]!r}: list the keys to see their ids.")
        self.write_down(tenant, by, AuditAction.KEY_REVOKED, key_id, f"{key.role} {key.label}".strip())

    async def put_user(self, user: UserRecord, by: str = "") -> None:
        """Keep a user; keys that may more than it are lowered."""
        mine = self.enter(user.tenant)
        if mine.users.get(user.name) != user:
            mine.users[user.name] = user
            self.write_down(user.tenant, by, AuditAction.USER_CHANGED, user.name, user.role)
        for key in list(mine.keys.values()):
            if key.user == user.name and not user.role.includes(key.role):
                await self.replace_key(key.model_copy(update={"role": user.role}), by)

    async def list_users(self, tenant: str) -> Sequence[UserRecord]:
        """By name."""
        return sorted(self._look(tenant).users.values(), key=lambda user: user.name)

    async def delete_user(self, tenant: str, name: str, by: str = "") -> Sequence[str]:
        """Remove a user and revoke its keys; returns their ids."""
        mine = self._look(tenant)
        removed = mine.users.pop(name, None)
        if removed is not None:
            self.write_down(tenant, by, AuditAction.USER_REMOVED, name, "")
        revoked = [key.id for key in mine.keys.values() if key.user == name]
        if removed is None and not revoked:
            raise no_user(name)
        for key_id in revoked:
            await self.delete_key(tenant, key_id, by)
        return revoked

    async def audit_log(self, tenant: str, limit: int, before: str | None = None) -> Sequence[AuditEntry]:
        """Who did what, newest first, from before an entry's id on; about the last `AUDIT_KEPT` are there."""
        if before is not None:
            check_audit_id(before)
        older = (e for e in self._look(tenant).audit if before is None or _order(e.id) < _order(before))
        return list(itertools.islice(older, limit))

    async def ping(self) -> None:
        """A dictionary always answers."""

    async def close(self) -> None:
        """Nothing to give back."""


def _check_storage(mine: MemoryTenant, sizes: Mapping[str, int]) -> None:
    more, stored = sum(size for sha, size in sizes.items() if sha not in mine.sizes), sum(mine.sizes.values())
    if mine.storage_bytes is not None and stored + more > mine.storage_bytes:
        raise storage_full(mine.storage_bytes, stored, more)


def _order(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))
