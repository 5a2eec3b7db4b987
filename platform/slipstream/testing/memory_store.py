"""`MemoryStore`: the registry's `Store` without Redis. It passes the same contract tests as `RedisStore`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from adapter_registry.errors import BlobMissing, InUse, NotPublished, StoreUnavailable
from adapter_registry.records import (
    Access,
    AdapterDraft,
    AdapterSummary,
    AdapterVersion,
    AliasMove,
    AuditAction,
    AuditEntry,
    KeyRecord,
    SpeculationPolicy,
    Split,
    VersionSelector,
    VersionState,
    check_alias,
    check_audit_id,
    check_name,
    check_sha256,
    utc_now,
)
from adapter_registry.store import AUDIT_KEPT, MOVES_KEPT, Store, storage_full

_CLAIM_POLL_S = 0.01


@dataclass
class _Adapter:
    versions: dict[int, AdapterVersion] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    access: Access = field(default_factory=Access)
    splits: dict[str, Split] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)  # alias -> version before its last move
    moves: deque[AliasMove] = field(default_factory=lambda: deque(maxlen=MOVES_KEPT))  # newest first


@dataclass
class _Tenant:
    adapters: dict[str, _Adapter] = field(default_factory=dict)
    numbers: Counter[str] = field(default_factory=Counter)  # last version given, kept after deletes
    refs: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, int] = field(default_factory=dict)  # of what is in refs
    storage_bytes: int | None = None  # its quota; `MemoryTenants` sets it
    garbage: dict[str, float] = field(default_factory=dict)  # sha256 without refs -> since when
    deleting: dict[str, float] = field(default_factory=dict)  # sha256 a sweeper is removing -> since when
    keys: dict[str, KeyRecord] = field(default_factory=dict)
    key_uses: dict[str, datetime] = field(default_factory=dict)
    audit: deque[AuditEntry] = field(default_factory=lambda: deque(maxlen=AUDIT_KEPT))  # newest first


class MemoryStore(Store):
    """Records in dictionaries; between two awaits nothing else runs, so every method is atomic."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, claim_wait_s: float = 10.0, sweep_lease_s: float = 900.0
    ) -> None:
        self._clock = clock
        self._claim_wait_s = claim_wait_s
        self._sweep_lease_s = sweep_lease_s
        self._tenants: dict[str, _Tenant] = {}
        self._entries = itertools.count()

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
        adapter = mine.adapters.get(draft.name, _Adapter())
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

    async def resolve(self, tenant: str, selector: VersionSelector, point: float | None = None) -> AdapterVersion:
        """The READY version a reference means, on this side of an alias's split. Raises `NotPublished`."""
        owner = selector.tenant or tenant
        adapter = self._look(owner).adapters.get(selector.name, _Adapter())
        found: AdapterVersion | None = None
        alias = {"default": "prod", "alias": selector.alias or ""}.get(selector.by, "")
        split = adapter.splits.get(alias)
        if split is not None and point is not None and point < split.weight:
            found = adapter.versions.get(split.version)
        elif selector.by == "default":
            found = _summary(owner, selector.name, adapter).current
        elif selector.by == "version":
            found = adapter.versions.get(selector.version or 0)
        elif selector.by == "alias":
            found = adapter.versions.get(adapter.aliases.get(selector.alias or "", 0))
        else:
            found = next((v for v in adapter.versions.values() if v.digest == selector.digest), None)
        may = owner == tenant or adapter.access.allows(check_name(tenant, "tenant"))
        if found is None or found.state is not VersionState.READY or not may:
            raise _not_published(selector.name)
        return found

    async def get(self, tenant: str, name: str) -> AdapterSummary:
        """One adapter with its versions and aliases. Raises `NotPublished`."""
        return _summary(tenant, name, self._adapter(tenant, name))

    async def list(self, tenant: str) -> Sequence[AdapterSummary]:
        """All of a tenant's adapters, by name."""
        return [_summary(tenant, name, adapter) for name, adapter in sorted(self._look(tenant).adapters.items())]

    async def delete(
        self, tenant: str, name: str, version: int | None = None, by: str = ""
    ) -> Sequence[AdapterVersion]:
        """Remove one version, or the adapter with all its versions and aliases; newest first."""
        mine, adapter = self._look(tenant), self._adapter(tenant, name)
        doomed = sorted(adapter.versions if version is None else {version} & set(adapter.versions), reverse=True)
        if not doomed:
            raise _not_published(name)
        alias = next((alias for alias, number in adapter.aliases.items() if number == version), None)
        alias = alias or next((alias for alias, split in adapter.splits.items() if split.version == version), None)
        if alias is not None:
            raise InUse(f"The alias {alias!r} points at {name}@{version}: move or delete the alias first.")
        removed = [adapter.versions.pop(number) for number in doomed]
        for gone in removed:
            self.write_down(tenant, by, AuditAction.VERSION_DELETED, gone.ref, gone.digest)
        if not adapter.versions:
            del mine.adapters[name]
        for sha in (sha for gone in removed for sha in gone.blob_sha256s):
            self.release_blob(tenant, sha)
        return removed

    async def set_alias(
        self, tenant: str, name: str, alias: str, version: int, by: str = "", split: Split | None = None
    ) -> None:
        """Point an alias at a READY version, and a part of its requests at another."""
        self._move(tenant, name, alias, version, by, split)

    async def roll_back_alias(self, tenant: str, name: str, alias: str, by: str = "") -> int:
        """Take an alias's split away, or point it at where it pointed before its last move. Raises `NotPublished`."""
        adapter = self._adapter(tenant, name)
        to = adapter.aliases.get(alias) if check_alias(alias) in adapter.splits else adapter.before.get(alias)
        if to is None:
            raise _not_published(name)
        self._move(tenant, name, alias, to, by)
        return to

    async def delete_alias(self, tenant: str, name: str, alias: str, by: str = "") -> None:
        """Remove an alias. Raises `NotPublished`."""
        if check_alias(alias) not in self._adapter(tenant, name).aliases:
            raise _not_published(name)
        self._move(tenant, name, alias, None, by)

    async def alias_moves(self, tenant: str, name: str) -> Sequence[AliasMove]:
        """What became of an adapter's aliases, newest first; the last `MOVES_KEPT`."""
        return list(self._look(tenant).adapters.get(check_name(name), _Adapter()).moves)

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
            _summary(owner, name, adapter)
            for owner, theirs in sorted(self._tenants.items())
            for name, adapter in sorted(theirs.adapters.items())
            if owner != tenant and adapter.access.allows(tenant)
        ]

    def _move(
        self, tenant: str, name: str, alias: str, version: int | None, by: str, split: Split | None = None
    ) -> None:
        check_alias(alias)
        adapter = self._adapter(tenant, name)
        before, split_before = adapter.aliases.get(alias), adapter.splits.pop(alias, None)
        for number in [n for n in (version, split.version if split is not None else None) if n is not None]:
            target = adapter.versions.get(number)
            if target is None or target.state is not VersionState.READY:
                if split_before is not None:
                    adapter.splits[alias] = split_before
                raise _not_published(name)
        if version is None:
            del adapter.aliases[alias]
        else:
            adapter.aliases[alias] = version
        if split is not None:
            adapter.splits[alias] = split
        if version != before:
            adapter.before.pop(alias, None)
            if before is not None:
                adapter.before[alias] = before
        if version != before or split != split_before:
            move = AliasMove(alias=alias, version=version, before=before, by=by, at=utc_now(), split=split)
            adapter.moves.appendleft(move)
            detail = f"{before or 'none'} to {version or 'none'}"
            if split is not None:
                detail += f", {split.weight:g} of it to {split.version}"
            self.write_down(tenant, by, AuditAction.ALIAS_MOVED, f"{name}@{alias}", detail)

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
            raise _not_published(name)
        adapter.versions[version] = found.model_copy(update=changes)
        return adapter.versions[version]

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

    def _hold(self, mine: _Tenant, sha256: str, size: int | None) -> None:
        mine.refs[sha256] += 1
        if size is not None:
            mine.sizes[sha256] = size
        mine.garbage.pop(sha256, None)

    async def tenants(self) -> Sequence[str]:
        """Every tenant that has ever published, claimed blobs or been given a key, by name."""
        return sorted(self._tenants)

    async def put_key(self, key: KeyRecord, by: str = "") -> None:
        """Keep a key."""
        keys = self.enter(key.tenant).keys
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

    async def audit_log(self, tenant: str, limit: int, before: str | None = None) -> Sequence[AuditEntry]:
        """Who did what, newest first, from before an entry's id on; about the last `AUDIT_KEPT` are there."""
        if before is not None:
            check_audit_id(before)
        older = (e for e in self._look(tenant).audit if before is None or _order(e.id) < _order(before))
        return list(itertools.islice(older, limit))

    def write_down(self, tenant: str, by: str, action: AuditAction, subject: str, detail: str) -> None:
        """One entry of the audit log."""
        now = utc_now()
        id_ = f"{int(now.timestamp() * 1000)}-{next(self._entries)}"
        entry = AuditEntry(id=id_, at=now, by=by, action=action, subject=subject, detail=detail)
        self.enter(tenant).audit.appendleft(entry)

    async def ping(self) -> None:
        """A dictionary always answers."""

    async def close(self) -> None:
        """Nothing to give back."""

    def enter(self, tenant: str) -> _Tenant:
        """The tenant's state, made on the first write."""
        return self._tenants.setdefault(check_name(tenant, "tenant"), _Tenant())

    def _look(self, tenant: str) -> _Tenant:
        """The tenant's state; reading does not make a tenant."""
        return self._tenants.get(check_name(tenant, "tenant"), _Tenant())

    def _adapter(self, tenant: str, name: str) -> _Adapter:
        adapter = self._look(tenant).adapters.get(check_name(name))
        if adapter is None:
            raise _not_published(name)
        return adapter


def _check_storage(mine: _Tenant, sizes: Mapping[str, int]) -> None:
    more, stored = sum(size for sha, size in sizes.items() if sha not in mine.sizes), sum(mine.sizes.values())
    if mine.storage_bytes is not None and stored + more > mine.storage_bytes:
        raise storage_full(mine.storage_bytes, stored, more)


def _order(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))


def _summary(tenant: str, name: str, adapter: _Adapter) -> AdapterSummary:
    newest_first = tuple(adapter.versions[number] for number in sorted(adapter.versions, reverse=True))
    return AdapterSummary(
        tenant=tenant,
        name=name,
        versions=newest_first,
        aliases=dict(adapter.aliases),
        splits=dict(adapter.splits),
        access=adapter.access,
    )


def _not_published(name: str) -> NotPublished:
    # One text for every way of not being there, another tenant's adapter included.
    return NotPublished(f"Nothing is published as {name!r} under this name, version or alias.")
