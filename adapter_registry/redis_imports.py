"""`RedisImports`: adapters on their way in, in Redis, beside the registry's records and on the same references to blobs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapter_registry.errors import BlobMissing, NotPublished, StoreUnavailable
from adapter_registry.imports import (
    IMPORTS_KEPT,
    MAX_OPEN,
    ImportRecord,
    ImportStore,
    has_ended,
    no_import,
    too_many,
)
from adapter_registry.jobs import Page, PageQuery, not_in_list
from adapter_registry.records import check_name, check_sha256
from adapter_registry.redis_connection import RedisConnection
from adapter_registry.scripts import PREFIX, TENANTS_KEY, TenantKeys

IMPORT_SCRIPTS = ("import_add", "import_part", "import_replace", "list_page")
_TRIES = 100  # of a compare-and-set: each failure means that somebody else got on
# Sets of `tenant/id`, of all tenants. Looked at often and by all, so they hold what there is to do and little more.
OPEN_KEY = PREFIX + "{imports}:open"
DUE_KEY = PREFIX + "{imports}:due"


class _Keys(TenantKeys):
    """A tenant's keys, with those of its imports."""

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        base = f"{PREFIX}{{{check_name(tenant, 'tenant')}}}:imports"
        self.imports = base  # hash: id -> record
        self.import_order = base + ":order"  # zset: id -> number
        self.open_imports = base + ":open"  # set: ids
        self._parts = base + ":parts:"

    def parts(self, import_id: str) -> str:
        """Hash: `path:index` -> sha256. The id was checked by whoever made it."""
        return self._parts + import_id


class RedisImports(RedisConnection, ImportStore):
    """Build it with `from_url`; one instance serves one event loop."""

    SCRIPTS = IMPORT_SCRIPTS

    async def add(self, record: ImportRecord) -> None:
        """Keep a new one. Raises `InUse` when `MAX_OPEN` of the tenant have not ended."""
        keys = _Keys(record.tenant)
        await self._command("SADD", TENANTS_KEY, record.tenant)
        args: list[str | int] = [record.id, _stored(record), MAX_OPEN, IMPORTS_KEPT]
        if not await self._script("import_add", [keys.imports, keys.import_order, keys.open_imports], args):
            raise too_many()
        # One that a crash leaves out of the indexes is asked for again by its client, or ends with the tenant's next ones.
        await self._command("SADD", OPEN_KEY, f"{record.tenant}/{record.id}")
        if record.is_due:
            await self._command("SADD", DUE_KEY, f"{record.tenant}/{record.id}")

    async def get(self, tenant: str, import_id: str) -> ImportRecord:
        """Raises `NotPublished`."""
        return _record(await self._read(tenant, import_id))

    async def list(self, tenant: str, query: PageQuery) -> Page[ImportRecord]:
        """In order of arrival. Raises `NotPublished` when `after` is not in the list."""
        keys = _Keys(tenant)
        args: list[str | int] = [query.after or "", query.limit, int(query.newest_first)]
        answer: Any = await self._script("list_page", [keys.imports, keys.import_order], args)
        if answer is None:
            raise not_in_list(query.after or "")
        return Page([_record(item) for item in answer[1:]], bool(answer[0]))

    async def put_part(self, tenant: str, import_id: str, path: str, index: int, sha256: str) -> None:
        """Hold a blob as part `index` of a file. Raises `NotPublished`, `ImportEnded` and `BlobMissing`."""
        keys = _Keys(tenant)
        places = [keys.imports, keys.parts(import_id), keys.refs, keys.garbage, keys.sizes]
        answer = await self._script("import_part", places, [import_id, f"{path}:{index}", check_sha256(sha256)])
        if answer == "missing":
            raise no_import(import_id)
        if answer == "closed":
            raise has_ended(await self.get(tenant, import_id))
        if answer == "unclaimed":
            raise BlobMissing("The part is not held any more: send it again.")

    async def parts(self, tenant: str, import_id: str) -> Mapping[tuple[str, int], str]:
        """(file, index) → sha256 of the parts that are here."""
        found = await self._command("HGETALL", _Keys(tenant).parts(import_id))
        return {(name.rpartition(":")[0], int(name.rpartition(":")[2])): sha for name, sha in found.items()}

    async def update(self, tenant: str, import_id: str, change: Callable[[ImportRecord], ImportRecord]) -> ImportRecord:
        """Replace one by what `change` makes of it; see `ImportStore`."""
        keys = _Keys(tenant)
        places = [keys.imports, keys.open_imports, keys.parts(import_id), keys.refs, keys.garbage, keys.sizes]
        for _ in range(_TRIES):
            stored = await self._read(tenant, import_id)
            before = _record(stored)
            if before.has_ended:
                raise has_ended(before)
            after = change(before)
            if after.is_due and not before.is_due:  # first: one that is only there is dropped by the next look at it
                await self._command("SADD", DUE_KEY, f"{tenant}/{import_id}")
            if await self._script("import_replace", places, [import_id, stored, _stored(after), int(after.has_ended)]):
                if after.has_ended:
                    for index in (OPEN_KEY, DUE_KEY):
                        await self._command("SREM", index, f"{tenant}/{import_id}")
                elif after.is_due:
                    await self._command(
                        "SADD", DUE_KEY, f"{tenant}/{import_id}"
                    )  # it may have been dropped just before
                return after
        raise StoreUnavailable(f"The import {import_id} is being changed by too many at once; try again.")

    async def open(self) -> Sequence[ImportRecord]:
        """Every tenant's that have not ended."""
        return await self._indexed(OPEN_KEY, lambda record: not record.has_ended)

    async def due(self) -> Sequence[ImportRecord]:
        """Those of them that somebody is to work on."""
        return await self._indexed(DUE_KEY, lambda record: record.is_due)

    async def _indexed(self, index: str, belongs: Callable[[ImportRecord], bool]) -> Sequence[ImportRecord]:
        """The records of an index; what does not belong there any more is dropped from it."""
        found = []
        for member in sorted(await self._command("SMEMBERS", index)):
            tenant, _, import_id = member.partition("/")
            try:
                record = await self.get(tenant, import_id)
            except NotPublished:
                record = None
            if record is None or not belongs(record):
                await self._command("SREM", index, member)
            else:
                found.append(record)
        return found

    async def _read(self, tenant: str, import_id: str) -> str:
        found = await self._command("HGET", _Keys(tenant).imports, import_id)
        if not found:
            raise no_import(import_id)
        return str(found)


def _stored(record: ImportRecord) -> str:
    """As it is kept: behind a mark of this very write, so that a retry knows its own earlier try."""
    return f"{secrets.token_hex(8)} {record.model_dump_json()}"


def _record(stored: str) -> ImportRecord:
    return ImportRecord.model_validate_json(stored.partition(" ")[2])
