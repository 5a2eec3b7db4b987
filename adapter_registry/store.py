"""The two seams of the registry: `Store` (records, in Redis) and `BlobStore` (content, in a bucket or folder).

Real twins: `adapter_registry.redis_store.RedisStore`, `adapter_registry.blobs.ObstoreBlobs`. Public fakes:
`slipstream.testing.MemoryStore`, `slipstream.testing.MemoryBlobs`. `tests/contract` runs one suite against all of them.

Publishing is: `claim_blobs(draft.blob_sha256s)` → `BlobStore.put` for each file, attachment and the manifest →
`publish` (one atomic script). `claim_blobs` comes first so that a sweep can never take a blob between "it is there
already" and the publish that refers to it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from adapter_registry.errors import NotPublished, StorageFull
from adapter_registry.keys import KeyRecord, UserRecord
from adapter_registry.records import (
    Access,
    AdapterDraft,
    AdapterSummary,
    AdapterVersion,
    AliasMove,
    AuditEntry,
    Guard,
    Outcome,
    Route,
    SpeculationPolicy,
    Split,
    VersionSelector,
    Watch,
)

MOVES_KEPT = 1000
UNGUARDED_WINDOW_S = 3600  # for outcomes of an alias without a guard
AUDIT_KEPT = 100_000  # entries of a tenant, or a few more


class Store(Protocol):
    """Records. Every method takes the tenant: no key is ever built without one."""

    async def claim_blobs(self, tenant: str, sha256s: Iterable[str]) -> None:
        """Protect these blobs from the sweep for the grace period. Call before putting them."""
        ...

    async def publish(self, draft: AdapterDraft) -> tuple[AdapterVersion, bool]:
        """Make a version visible, atomically; returns it and whether it is new.

        An identical digest under the same name returns the existing version, whose speculation policy stays as it is.
        Versions count 1, 2, 3… per name and are never reused, not even after a delete. Raises `BlobMissing` when one of
        `draft.blob_sha256s` is neither claimed nor in use (never claimed, or the grace period ended and it was swept):
        claim, put and publish again. Raises `StorageFull` when the tenant's quota does not hold it.
        """
        ...

    async def route(self, tenant: str, selector: VersionSelector, point: float | None = None) -> Route:
        """What a reference means; `point` in [0, 1) says on which side of an alias's split.

        Raises `NotPublished`, the same for another tenant's that is not shared.
        """
        ...

    async def resolve(self, tenant: str, selector: VersionSelector, point: float | None = None) -> AdapterVersion:
        """The READY version a reference means, as `route` has it."""
        return (await self.route(tenant, selector, point)).version

    async def get(self, tenant: str, name: str) -> AdapterSummary:
        """One adapter with its versions and aliases. Raises `NotPublished`."""
        ...

    async def list(self, tenant: str) -> Sequence[AdapterSummary]:
        """All of a tenant's adapters, by name."""
        ...

    async def delete(
        self, tenant: str, name: str, version: int | None = None, by: str = ""
    ) -> Sequence[AdapterVersion]:
        """Remove one version, or the adapter with all its versions and aliases. Returns what was removed.

        Raises `NotPublished`, and `InUse` when one version is asked for and an alias or its split points at it. Blobs that
        nothing refers to any more become garbage; `sweep` frees them after the grace period.
        """
        ...

    async def set_alias(
        self,
        tenant: str,
        name: str,
        alias: str,
        version: int,
        by: str = "",
        split: Split | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Point an alias at a READY version, and a part of its requests at another; without `split` all go to `version`.

        `guard` watches the newer of both, and holds until the next move. Raises `NotPublished` or `InvalidName`.
        """
        ...

    async def note_outcome(self, watch: Watch, version: int, outcome: Outcome, told_id: str) -> str:
        """Count what became of requests of a watched alias; why it was rolled back by that, or "".

        What is told again under the same id counts once. A rollback is that of `roll_back_alias`, happens once, and ends the
        guard. Versions that the alias has left are not counted.
        """
        ...

    async def outcomes(self, tenant: str, name: str) -> Mapping[tuple[str, int], Outcome]:
        """(alias, version) → what became of requests since the alias's last move, in about the last window."""
        ...

    async def roll_back_alias(self, tenant: str, name: str, alias: str, by: str = "") -> int:
        """Take an alias's split away, or if it has none point it at where it pointed before its last move; returns its
        version. Without a split, rolling back twice is where it was.

        Raises `NotPublished` when that version is gone, or there was none.
        """
        ...

    async def delete_alias(self, tenant: str, name: str, alias: str, by: str = "") -> None:
        """Remove an alias. Raises `NotPublished`."""
        ...

    async def alias_moves(self, tenant: str, name: str) -> Sequence[AliasMove]:
        """What became of an adapter's aliases, newest first; the last `MOVES_KEPT`."""
        ...

    async def set_access(self, tenant: str, name: str, access: Access, by: str = "") -> None:
        """Say who else may call an adapter; holds for the next request. Raises `NotPublished`."""
        ...

    async def shared_with(self, tenant: str) -> Sequence[AdapterSummary]:
        """Others' adapters that a tenant may call, by owner and name."""
        ...

    async def set_speculation(self, tenant: str, name: str, version: int, policy: SpeculationPolicy) -> AdapterVersion:
        """Change what "auto" means for a READY version; returns the version as it is now. Raises `NotPublished`."""
        ...

    async def set_labels(self, tenant: str, name: str, version: int, labels: Mapping[str, str]) -> AdapterVersion:
        """Replace a READY version's labels; returns the version as it is now. Raises `NotPublished`."""
        ...

    async def stored_bytes(self, tenant: str) -> int:
        """What counts against the tenant's quota of `storage_bytes`."""
        ...

    async def mend_sizes(self, tenant: str) -> None:
        """Count anew what the tenant stores, in case a gateway of an older version has changed it without counting."""
        ...

    async def adopt_blobs(self, tenant: str, sha256s: Iterable[str]) -> int:
        """Make garbage of those that are neither in use nor garbage already; returns how many. What a lost or restored
        registry left in the blob store is found so."""
        ...

    async def begin_sweep(self, tenant: str, older_than_s: float) -> Sequence[str]:
        """Mark garbage blobs older than the grace period as being deleted and return their sha256."""
        ...

    async def end_sweep(self, tenant: str, sha256s: Iterable[str]) -> None:
        """The blobs returned by `begin_sweep` are gone."""
        ...

    async def tenants(self) -> Sequence[str]:
        """Every tenant that has ever published or been given a key, by name."""
        ...

    async def put_key(self, key: KeyRecord, by: str = "") -> None:
        """Keep a key. Raises `NotPublished` when it belongs to a user that there is not, or who may less than it."""
        ...

    async def replace_key(self, key: KeyRecord, by: str = "") -> None:
        """Change a key's record, of the same secret. Raises `NotPublished` when it has been revoked."""
        ...

    async def find_key(self, sha256: str) -> KeyRecord | None:
        """The key whose secret has this hash."""
        ...

    async def list_keys(self, tenant: str) -> Sequence[KeyRecord]:
        """A tenant's keys, oldest first."""
        ...

    async def note_key_use(self, tenant: str, key_id: str) -> None:
        """It was used just now; unknown ones are not noted."""
        ...

    async def key_uses(self, tenant: str) -> Mapping[str, datetime]:
        """When each of a tenant's keys was last used, to the minute, for those that were."""
        ...

    async def delete_key(self, tenant: str, key_id: str, by: str = "") -> None:
        """Revoke. Raises `NotPublished` when there is none of this id."""
        ...

    async def put_user(self, user: UserRecord, by: str = "") -> None:
        """Keep a user; keys that may more than it are lowered. A crash in between is mended by doing it again."""
        ...

    async def list_users(self, tenant: str) -> Sequence[UserRecord]:
        """By name."""
        ...

    async def delete_user(self, tenant: str, name: str, by: str = "") -> Sequence[str]:
        """Remove a user and revoke its keys; returns their ids. The user goes first, so that no key is made meanwhile.

        Raises `NotPublished` when there is neither such a user nor a key of one.
        """
        ...

    async def audit_log(self, tenant: str, limit: int, before: str | None = None) -> Sequence[AuditEntry]:
        """Who did what, newest first, from before an entry's id on; about the last `AUDIT_KEPT` are there."""
        ...

    async def ping(self) -> None:
        """Raises `StoreUnavailable` when the store does not answer."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


def no_such_user(key: KeyRecord) -> NotPublished:
    """The refusal of a key that nobody may have."""
    return NotPublished(
        f"There is no user {key.user!r} who may be {key.role}: make the user, or give the key a lower role."
    )


def no_user(name: str) -> NotPublished:
    """The same for unknown ones and other tenants'."""
    return NotPublished(f"There is no user {name[:100]!r}: list the users to see them.")


def storage_full(quota: int, stored: int, more: int) -> StorageFull:
    """The refusal of a version that would be too much."""
    return StorageFull(
        f"The tenant's quota is {quota} bytes of storage; {stored} are in use and this needs {more} more. Delete versions "
        "or files that are no longer needed, or ask for a larger quota."
    )


class BlobStore(Protocol):
    """Content, per tenant, under its sha256. Writing is idempotent; reading checks the hash."""

    async def put_file(self, tenant: str, sha256: str, path: Path) -> None:
        """Store a file's content (streamed). Nothing is visible under the name until all of it is there."""
        ...

    async def put_bytes(self, tenant: str, sha256: str, data: bytes) -> None:
        """Store a small blob."""
        ...

    async def exists(self, tenant: str, sha256: str) -> bool:
        """Whether the blob is there."""
        ...

    async def get_bytes(self, tenant: str, sha256: str) -> bytes:
        """A small blob, checked. Raises `BlobMissing` or `BlobCorrupt`."""
        ...

    async def fetch_file(self, tenant: str, sha256: str, destination: Path) -> None:
        """Stream a blob into a file, checked; a partial or corrupt download is never visible at `destination`."""
        ...

    async def delete(self, tenant: str, sha256: str) -> None:
        """Remove a blob; no error when it is not there."""
        ...

    def list(self, tenant: str) -> AsyncIterator[str]:
        """The sha256 of every blob of a tenant."""
        ...
