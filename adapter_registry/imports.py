"""Adapters on their way into the registry: uploads in parts, and pulls. Records, and the seam `ImportStore`.

Real twin: `adapter_registry.redis_imports.RedisImports`. Public fake: `slipstream.testing.MemoryImports`. Both run the same
suite in `tests/contract`.

Parts of files are blobs of the tenant like all others, held by their import until it ends; so they may come through any
gateway, again, and in any order, and what an abandoned import leaves behind is garbage of the registry's sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Protocol

from pydantic import Field, StringConstraints

from adapter_registry.errors import InUse, NotPublished, RegistryError
from adapter_registry.jobs import Page, PageQuery
from adapter_registry.records import FileEntry, Frozen, Name, VersionState, VersionWish

IMPORT_PREFIX = "imp-"
PART_BYTES = 8 << 20
MAX_OPEN = 100  # imports of a tenant that have not ended
IMPORTS_KEPT = 1000  # of a tenant, with those that have

ImportId = Annotated[str, StringConstraints(pattern=r"^imp-[0-9a-f]{24}$")]
_ENDS = frozenset({VersionState.READY, VersionState.REJECTED})


class SmokePrompt(Frozen):
    """What a version must answer before it becomes visible: anything, or a text with `expect` in it."""

    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    expect: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 32


class ImportFault(Frozen):
    """Why an import was rejected."""

    code: str
    message: str
    param: str | None = None


class Lease(Frozen):
    """Who works on it now; whoever finds it over may take it."""

    holder: str
    until: datetime


class ImportRecord(Frozen):
    """One adapter on its way. REGISTERED: its files are coming; VALIDATING: they are all here; then READY or REJECTED."""

    id: ImportId
    tenant: Name
    name: Name
    base: str | None = None  # model, where several are served
    files: Annotated[tuple[FileEntry, ...], Field(max_length=64)] = ()  # of an upload
    source: Annotated[str, Field(max_length=500)] = ""  # of a pull: a URL
    wish: VersionWish = VersionWish()
    smoke: Annotated[tuple[SmokePrompt, ...], Field(max_length=8)] = ()
    created_by: str = ""  # key id
    created_at: datetime
    state: VersionState = VersionState.REGISTERED
    lease: Lease | None = None
    attempts: int = 0  # how often somebody began to work on it
    received_bytes: int = 0  # of a pull
    version: str | None = None  # `name@3`, when it is READY
    is_new: bool | None = None  # whether that version was made by this
    fault: ImportFault | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _ENDS

    @property
    def is_due(self) -> bool:
        """Whether somebody is to work on it, now or when the lease is over."""
        return not self.has_ended and (self.state is VersionState.VALIDATING or bool(self.source))

    @property
    def size_bytes(self) -> int:
        """Of all files of an upload."""
        return sum(entry.size for entry in self.files)

    def file(self, path: str) -> FileEntry | None:
        """The file of this name."""
        return next((entry for entry in self.files if entry.path == path), None)

    def changed(self, **changes: object) -> ImportRecord:
        """This import with other fields, validated."""
        return ImportRecord.model_validate({**self.model_dump(), **changes})


class ImportEnded(RegistryError):
    """It has ended, or its files are all here: nothing may be added or changed."""


class ImportStore(Protocol):
    """Imports. Other tenants' look like unknown ones: `NotPublished`."""

    async def add(self, record: ImportRecord) -> None:
        """Keep a new one. Raises `InUse` when `MAX_OPEN` of the tenant have not ended."""
        ...

    async def get(self, tenant: str, import_id: str) -> ImportRecord:
        """Raises `NotPublished`."""
        ...

    async def list(self, tenant: str, query: PageQuery) -> Page[ImportRecord]:
        """In order of arrival, about the last `IMPORTS_KEPT`. Raises `NotPublished` when `after` is not in the list."""
        ...

    async def put_part(self, tenant: str, import_id: str, path: str, index: int, sha256: str) -> None:
        """Hold a blob as part `index` of a file, instead of what was there.

        Raises `NotPublished`, `ImportEnded` when no more parts are taken, and `BlobMissing` unless the blob was claimed.
        """
        ...

    async def parts(self, tenant: str, import_id: str) -> Mapping[tuple[str, int], str]:
        """(file, index) → sha256 of the parts that are here."""
        ...

    async def update(self, tenant: str, import_id: str, change: Callable[[ImportRecord], ImportRecord]) -> ImportRecord:
        """Replace one by what `change` makes of it, unless somebody else changed it in between: then again.

        One that ends lets go of its parts in the same step. Raises `NotPublished`, `ImportEnded` when it had ended, and
        whatever `change` raises.
        """
        ...

    async def open(self) -> Sequence[ImportRecord]:
        """Every tenant's that have not ended."""
        ...

    async def due(self) -> Sequence[ImportRecord]:
        """Those of them that somebody is to work on."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


def part_count(size: int) -> int:
    """Parts of a file; an empty one has none."""
    return -(-size // PART_BYTES)


def part_size(size: int, index: int) -> int:
    """Bytes of a file's part."""
    return min(PART_BYTES, size - index * PART_BYTES)


def no_import(import_id: str) -> NotPublished:
    """The same for unknown ones and other tenants'."""
    return NotPublished(f"There is no import {import_id[:80]!r}: GET /v1/imports lists yours.")


def too_many() -> InUse:
    """The refusal of one more."""
    return InUse(f"{MAX_OPEN} imports have not ended. Complete or delete some first: GET /v1/imports lists them.")


def has_ended(record: ImportRecord) -> ImportEnded:
    """The refusal of a change."""
    return ImportEnded(f"The import {record.id} is {record.state}: it takes no more parts or changes. Begin a new one.")
