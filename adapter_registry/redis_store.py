"""`RedisStore`: the registry's records in Redis. Whatever must change together changes in one Lua script."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis, RedisCluster

from adapter_registry.changes import Change
from adapter_registry.errors import BlobMissing, InUse, StoreUnavailable
from adapter_registry.migrations import count_sizes
from adapter_registry.records import (
    Access,
    AdapterDraft,
    AdapterSummary,
    AdapterVersion,
    AuditEntry,
    Guard,
    Lineage,
    SpeculationPolicy,
    Split,
    VersionState,
    check_audit_id,
    check_sha256,
    utc_now,
)
from adapter_registry.redis_aliases import RedisAliases, not_published, version_of
from adapter_registry.redis_keys import RedisKeys
from adapter_registry.scripts import PUBLIC_KEY, SCRIPTS, TENANTS_KEY, TenantKeys
from adapter_registry.store import AUDIT_KEPT, Store, storage_full

SWEEP_BATCH = 1000  # blobs marked per sweep: a script blocks the whole server while it runs
SHARED_LISTED = 10_000  # of others' adapters, and of public ones: more can be called, but are not listed
_LIST_BATCH = 100  # adapters read per script, for the same reason
_CLAIM_POLL_S = (0.02, 0.5)  # first and longest pause while a sweeper finishes


class RedisStore(RedisAliases, RedisKeys, Store):
    """The registry's truth. Build it with `from_url`; one instance serves one event loop."""

    SCRIPTS = SCRIPTS

    def __init__(
        self,
        client: Redis | RedisCluster,
        *,
        max_connections: int = 64,
        claim_wait_s: float = 10.0,
        sweep_lease_s: float = 900.0,
    ) -> None:
        super().__init__(client, max_connections=max_connections)
        self._claim_wait_s = claim_wait_s
        # Longer than any sweep takes: a sweeper that is merely slow must not meet a publisher who thinks it died.
        self._sweep_lease_s = sweep_lease_s

    async def claim_blobs(self, tenant: str, sha256s: Iterable[str]) -> None:
        """Protect these blobs from the sweep for the grace period. Call before putting them."""
        keys = TenantKeys(tenant)
        shas = sorted({check_sha256(sha) for sha in sha256s})
        # The index first: a tenant whose upload dies here still has garbage that a sweep must find.
        await self._command("SADD", TENANTS_KEY, tenant)
        deadline = asyncio.get_running_loop().time() + self._claim_wait_s
        pause_s, longest_s = _CLAIM_POLL_S
        while await self._script("claim", [keys.refs, keys.garbage, keys.deleting], shas):
            if asyncio.get_running_loop().time() + pause_s > deadline:
                raise StoreUnavailable("These files are being cleaned up right now; try again in a moment.")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    async def publish(self, draft: AdapterDraft) -> tuple[AdapterVersion, bool]:
        """Make a version visible, atomically; returns it and whether it is new."""
        keys = TenantKeys(draft.tenant)
        adapter = keys.adapter(draft.name)
        sizes = [word for sha, size in sorted(draft.blob_sizes.items()) for word in (sha, size)]
        await self._command("SADD", TENANTS_KEY, draft.tenant)  # first, as in claim_blobs
        answer = await self._script(
            "publish",
            [
                keys.names,
                adapter.versions,
                adapter.digests,
                keys.numbers,
                keys.refs,
                keys.garbage,
                keys.audit,
                keys.sizes,
                keys.settings,
            ],
            [draft.name, draft.digest, _envelope(draft), draft.created_by, AUDIT_KEPT, *sizes],
        )
        if answer[0] == "full":
            raise storage_full(*map(int, answer[1:]))
        if answer[0] == "unclaimed":
            raise BlobMissing("Some of this version's files are not held for it any more: upload them again.")
        return version_of(answer[1], answer[2]), answer[0] == "new"

    async def get(self, tenant: str, name: str) -> AdapterSummary:
        """One adapter with its versions and aliases. Raises `NotPublished`."""
        found = await self._describe(tenant, [name])
        if not found:
            raise not_published(name)
        return found[0]

    async def list(self, tenant: str) -> Sequence[AdapterSummary]:
        """All of a tenant's adapters, by name."""
        names = sorted(await self._command("SMEMBERS", TenantKeys(tenant).names))
        batches = [names[i : i + _LIST_BATCH] for i in range(0, len(names), _LIST_BATCH)]
        return [summary for batch in batches for summary in await self._describe(tenant, batch)]

    async def delete(
        self, tenant: str, name: str, version: int | None = None, by: str = ""
    ) -> Sequence[AdapterVersion]:
        """Remove one version, or the adapter with all its versions and aliases; newest first."""
        keys = TenantKeys(tenant)
        adapter = keys.adapter(name)
        answer = await self._script(
            "delete",
            [
                keys.names,
                adapter.versions,
                adapter.digests,
                adapter.aliases,
                keys.refs,
                keys.garbage,
                adapter.access,
                adapter.moves,
                adapter.before,
                keys.audit,
                adapter.splits,
                keys.sizes,
                adapter.guards,
                adapter.outcomes,
                adapter.noted,
            ],
            [name, "" if version is None else version, by, AUDIT_KEPT],
        )
        if answer[0] == "missing":
            raise not_published(name)
        if answer[0] == "in_use":
            raise InUse(f"The alias {answer[1]!r} points at {name}@{version}: move or delete the alias first.")
        numbers, envelopes, last = answer[1::3], answer[2::3], answer[3::3]
        for envelope, is_last in zip(envelopes, last, strict=True):
            if is_last == "1":
                await self._tell(Change(tenant=tenant, gone=json.loads(envelope)["digest"]))
        return _versions([word for pair in zip(numbers, envelopes, strict=True) for word in pair])

    async def set_access(self, tenant: str, name: str, access: Access, by: str = "") -> None:
        """Say who else may call an adapter; holds for the next request. Raises `NotPublished`."""
        keys, label = TenantKeys(tenant).adapter(name), f"{tenant}/{name}"
        if not await self._command("EXISTS", keys.versions):
            raise not_published(name)
        # Others' slots, so no single script. Indexes only serve listings, where an entry too many is passed over and
        # dropped: they are written before the access that they stand for, and again after it, in case one was dropped.
        indexes = [TenantKeys(other).shared for other in access.tenants] + [PUBLIC_KEY] * access.public
        await self._index(indexes, label)
        audit = TenantKeys(tenant).audit
        args: list[str | int] = [access.model_dump_json(), by, name, AUDIT_KEPT]
        if not await self._script("set_access", [keys.versions, keys.access, audit], args):
            raise not_published(name)
        await self._index(indexes, label)

    async def _index(self, indexes: Sequence[str], *labels: str) -> None:
        for index in indexes:
            if int(await self._command("SCARD", index)) < SHARED_LISTED:  # others fill it: it must not grow for ever
                await self._command("SADD", index, *labels)

    async def shared_with(self, tenant: str) -> Sequence[AdapterSummary]:
        """Others' adapters that a tenant may call, by owner and name."""
        found = dict[str, AdapterSummary]()
        for index in (TenantKeys(tenant).shared, PUBLIC_KEY):
            labels = set(await self._command("SMEMBERS", index))
            seen = await self._labelled(labels)
            allowed = {label for label, summary in seen.items() if summary.access.allows(tenant)}
            if dropped := labels - allowed:
                await self._command("SREM", index, *dropped)
                # One that was shared while this looked at the others was dropped with its second entry.
                again = [s for s in (await self._labelled(dropped)).values() if s.access.allows(tenant)]
                await self._index([index] * bool(again), *(f"{s.tenant}/{s.name}" for s in again))
            found |= {label: seen[label] for label in allowed if seen[label].tenant != tenant}
        return sorted(found.values(), key=lambda summary: (summary.tenant, summary.name))

    async def _labelled(self, labels: Iterable[str]) -> dict[str, AdapterSummary]:
        """The adapters at `tenant/name` that there are."""
        names = defaultdict[str, list[str]](list)
        for label in labels:
            owner, _, name = label.partition("/")
            names[owner].append(name)
        found = [
            summary
            for owner, mine in names.items()
            for i in range(0, len(mine), _LIST_BATCH)
            for summary in await self._describe(owner, mine[i : i + _LIST_BATCH])
        ]
        return {f"{summary.tenant}/{summary.name}": summary for summary in found}

    async def set_speculation(self, tenant: str, name: str, version: int, policy: SpeculationPolicy) -> AdapterVersion:
        """Change what "auto" means for a READY version; returns the version as it is now. Raises `NotPublished`."""
        return await self._change(tenant, name, version, "speculation", policy.model_dump(mode="json"))

    async def set_labels(self, tenant: str, name: str, version: int, labels: Mapping[str, str]) -> AdapterVersion:
        """Replace a READY version's labels; returns the version as it is now. Raises `NotPublished`."""
        return await self._change(tenant, name, version, "labels", dict(labels))

    async def stored_bytes(self, tenant: str) -> int:
        """What counts against the tenant's quota of `storage_bytes`."""
        return int(await self._command("HGET", TenantKeys(tenant).sizes, "total") or 0)

    async def _change(self, tenant: str, name: str, version: int, field: str, value: object) -> AdapterVersion:
        key, number = TenantKeys(tenant).adapter(name).versions, str(version)
        # The new envelope is made here and only swapped in by a script: Lua's JSON would round floats and lose empty
        # lists. Whoever finds another value than it has read lost against a write that went through, and reads again.
        while stored := await self._command("HGET", key, number):
            envelope = json.loads(stored)
            if envelope["record"]["state"] != VersionState.READY:
                break
            envelope["record"][field] = value
            changed = json.dumps(envelope, allow_nan=False)
            if await self._script("replace_version", [key], [number, stored, changed]):
                return version_of(number, changed)
        raise not_published(name)

    async def mend_sizes(self, tenant: str) -> None:
        """Count anew what the tenant stores, in case a gateway of an older version has changed it without counting."""

        async def execute(*words: Any) -> Any:
            return await self._command(*map(str, words))

        await count_sizes(execute, tenant)

    async def adopt_blobs(self, tenant: str, sha256s: Iterable[str]) -> int:
        """Make garbage of those that are neither in use nor garbage already; returns how many."""
        keys, shas = TenantKeys(tenant), [check_sha256(sha) for sha in sha256s]
        return int(await self._script("adopt", [keys.refs, keys.garbage, keys.deleting], shas)) if shas else 0

    async def begin_sweep(self, tenant: str, older_than_s: float) -> Sequence[str]:
        """Mark garbage blobs older than the grace period as being deleted; a bounded batch at a time."""
        keys = TenantKeys(tenant)
        times_ms = [round(older_than_s * 1000), round(self._sweep_lease_s * 1000)]
        found = await self._script("begin_sweep", [keys.refs, keys.garbage, keys.deleting], [*times_ms, SWEEP_BATCH])
        return [str(sha) for sha in found]

    async def end_sweep(self, tenant: str, sha256s: Iterable[str]) -> None:
        """The blobs returned by `begin_sweep` are gone."""
        shas = [check_sha256(sha) for sha in sha256s]
        if shas:
            await self._command("ZREM", TenantKeys(tenant).deleting, *shas)

    async def tenants(self) -> Sequence[str]:
        """Every tenant that has ever published, claimed blobs or been given a key, by name."""
        return sorted(await self._command("SMEMBERS", TENANTS_KEY))

    async def audit_log(self, tenant: str, limit: int, before: str | None = None) -> Sequence[AuditEntry]:
        """Who did what, newest first, from before an entry's id on; about the last `AUDIT_KEPT` are there."""
        newest = "+" if before is None else f"({check_audit_id(before)}"
        found = await self._command("XREVRANGE", TenantKeys(tenant).audit, newest, "-", "COUNT", str(limit))
        return [audit_entry(*each) for each in found]

    async def _describe(self, tenant: str, names: Sequence[str]) -> Sequence[AdapterSummary]:
        """Those of `names` that have versions."""
        tenant_keys = TenantKeys(tenant)
        adapters = [tenant_keys.adapter(name) for name in names]
        keys = [key for a in adapters for key in (a.versions, a.aliases, a.access, a.splits, a.guards)]
        answer = await self._script("describe", keys, [])
        return [
            AdapterSummary(
                tenant=tenant,
                name=name,
                versions=tuple(_versions(versions)),
                aliases={alias: int(number) for alias, number in _pairs(aliases)},
                splits={alias: Split.model_validate_json(split) for alias, split in _pairs(splits)},
                guards={alias: Guard.model_validate_json(guard) for alias, guard in _pairs(guards)},
                access=Access.model_validate_json(access) if access else Access(),
            )
            for name, (versions, aliases, access, splits, guards) in zip(names, answer, strict=True)
            if versions
        ]


def _envelope(draft: AdapterDraft) -> str:
    """What is stored for a version. Its number is the hash field, since only the script knows it."""
    # Without what is as it was before there was anything else: an older gateway reads it, too.
    late = {name for name, nothing in (("labels", {}), ("lineage", Lineage())) if getattr(draft, name) == nothing}
    ready = {
        **draft.model_dump(mode="json", exclude=late),
        "state": VersionState.READY,
        "created_at": utc_now().isoformat(),
    }
    return json.dumps({"record": ready, "digest": draft.digest, "blobs": draft.blob_sha256s}, allow_nan=False)


def _versions(flat: Sequence[str]) -> Sequence[AdapterVersion]:
    found = (version_of(number, envelope) for number, envelope in _pairs(flat))
    return sorted(found, key=lambda version: version.version, reverse=True)


def audit_entry(id_: str, fields: Mapping[str, Any]) -> AuditEntry:
    """An entry of the log, as Redis gives it."""
    at = datetime.fromtimestamp(int(id_.partition("-")[0]) / 1000, UTC)
    return AuditEntry(id=id_, at=at, **fields)


def _pairs(flat: Sequence[str]) -> Sequence[tuple[str, str]]:
    """A Lua script's HGETALL comes as field, value, field, value…"""
    return list(zip(flat[::2], flat[1::2], strict=True))
