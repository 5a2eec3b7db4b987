"""`MemoryImports`: the registry's `ImportStore` without Redis. It passes the same contract tests as `RedisImports`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from adapter_registry.imports import (
    IMPORTS_KEPT,
    MAX_OPEN,
    ImportRecord,
    ImportStore,
    has_ended,
    no_import,
    too_many,
)
from adapter_registry.jobs import Page, PageQuery
from adapter_registry.records import VersionState, check_sha256
from slipstream.testing.memory_jobs import page_of
from slipstream.testing.memory_store import MemoryStore

_Key = tuple[str, str]  # tenant, id


class MemoryImports(ImportStore):
    """Records in dictionaries; `store` counts the references to blobs, as one Redis does for both real twins."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._records: dict[_Key, ImportRecord] = {}
        self._parts: dict[_Key, dict[tuple[str, int], str]] = {}

    async def add(self, record: ImportRecord) -> None:
        """Keep a new one. Raises `InUse` when `MAX_OPEN` of the tenant have not ended."""
        mine = [each for (tenant, _), each in self._records.items() if tenant == record.tenant]
        if sum(not each.has_ended for each in mine) >= MAX_OPEN:
            raise too_many()
        for old in [each for each in mine if each.has_ended][: max(0, len(mine) + 1 - IMPORTS_KEPT)]:
            del self._records[old.tenant, old.id]
        self._store.enter(record.tenant)
        self._records.setdefault((record.tenant, record.id), record)

    async def get(self, tenant: str, import_id: str) -> ImportRecord:
        """Raises `NotPublished`."""
        found = self._records.get((tenant, import_id))
        if found is None:
            raise no_import(import_id)
        return found

    async def list(self, tenant: str, query: PageQuery) -> Page[ImportRecord]:
        """In order of arrival. Raises `NotPublished` when `after` is not in the list."""
        return page_of({id_: record for (owner, id_), record in self._records.items() if owner == tenant}, query)

    async def put_part(self, tenant: str, import_id: str, path: str, index: int, sha256: str) -> None:
        """Hold a blob as part `index` of a file. Raises `NotPublished`, `ImportEnded` and `BlobMissing`."""
        record = await self.get(tenant, import_id)
        if record.state is not VersionState.REGISTERED:
            raise has_ended(record)
        parts = self._parts.setdefault((tenant, import_id), {})
        before = parts.get((path, index))
        if before == check_sha256(sha256):
            return
        self._store.hold_blob(tenant, sha256, None)
        parts[path, index] = sha256
        if before is not None:
            self._store.release_blob(tenant, before)

    async def parts(self, tenant: str, import_id: str) -> Mapping[tuple[str, int], str]:
        """(file, index) → sha256 of the parts that are here."""
        return dict(self._parts.get((tenant, import_id), {}))

    async def update(self, tenant: str, import_id: str, change: Callable[[ImportRecord], ImportRecord]) -> ImportRecord:
        """Replace one by what `change` makes of it; see `ImportStore`."""
        before = await self.get(tenant, import_id)
        if before.has_ended:
            raise has_ended(before)
        after = self._records[tenant, import_id] = change(before)
        if after.has_ended:
            for sha in self._parts.pop((tenant, import_id), {}).values():
                self._store.release_blob(tenant, sha)
        return after

    async def open(self) -> Sequence[ImportRecord]:
        """Every tenant's that have not ended."""
        return [record for record in self._records.values() if not record.has_ended]

    async def due(self) -> Sequence[ImportRecord]:
        """Those of them that somebody is to work on."""
        return [record for record in self._records.values() if record.is_due]

    async def close(self) -> None:
        """Nothing to give back."""
