"""What a backup is made of: keys of Redis as JSON, one file for each tenant, and a manifest that makes a backup of them.

The format has a number, `FORMAT`; docs/operations/backup.md describes it for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated

from pydantic import Field, JsonValue, StringConstraints, ValidationError

from adapter_registry.backup.kinds import Fate, KeyType, kind_of
from adapter_registry.errors import BackupInvalid
from adapter_registry.records import Frozen, Name, Sha256

FORMAT = 1
ID_FORMAT = "%Y%m%dT%H%M%S.%fZ"
BackupId = Annotated[str, StringConstraints(pattern=r"^[0-9]{8}T[0-9]{6}\.[0-9]{6}Z$")]
Count = Annotated[int, Field(ge=0)]


class Item(Frozen):
    """One key with all that is under it.

    `entries` are lists of words: one of a string, and one each of a list's and a set's members; field and value of a hash;
    member and score of a sorted set; of a stream an entry's id and then its fields and values.
    """

    key: str
    type: KeyType
    expires_at_ms: int | None = None  # by the clock, so that usage is kept as long as it would have been
    entries: tuple[tuple[str, ...], ...]

    def pairs(self) -> dict[str, str]:
        """A hash, or a sorted set with its scores."""
        return {words[0]: words[1] for words in self.entries}

    def members(self) -> list[str]:
        """The first word of each entry."""
        return [words[0] for words in self.entries]


class TenantFile(Frozen):
    """What the manifest says of one tenant's records."""

    tenant: Name
    sha256: Sha256  # of the file
    size: Count  # bytes of it
    keys: Count
    adapters: Count
    versions: Count
    blobs: Count


class Manifest(Frozen):
    """What makes a backup of files: it is written last."""

    format: int
    id: BackupId
    schema_version: Annotated[int, Field(ge=1)]  # of the registry's data
    created_at: datetime
    tenants: tuple[TenantFile, ...]


def encode_items(items: Iterable[Item]) -> bytes:
    """A tenant's file: a line of JSON for each key, by name."""
    lines = (item.model_dump_json(exclude_none=True) for item in sorted(items, key=lambda item: item.key))
    return "".join(f"{line}\n" for line in lines).encode()


def decode_items(tenant: str, file: bytes, entry: TenantFile) -> Sequence[Item]:
    """Read it back. Raises `BackupInvalid` for what this tenant's file may not hold."""
    if hashlib.sha256(file).hexdigest() != entry.sha256:
        raise BackupInvalid(f"The records of {tenant} are not as they were written: their sha256 is another.")
    try:
        items = [Item.model_validate_json(line) for line in file.splitlines()]
    except ValidationError as error:
        raise BackupInvalid(f"The records of {tenant} cannot be read: {error.errors()[0]['msg']}.") from error
    for item in items:
        placed = kind_of(item.key)
        if placed is None or placed.kind.fate is not Fate.KEPT or placed.kind.type is not item.type:
            raise BackupInvalid(
                f"The records of {tenant} hold {item.key[:120]!r}, which this Slipstream does not know."
            )
        if (placed.tenant or _owner(item)) != tenant:
            raise BackupInvalid(f"The records of {tenant} hold {item.key[:120]!r}, which is not {tenant}'s.")
    return items


def _owner(item: Item) -> str:
    """Whose API key is found there."""
    return str(json.loads(item.entries[0][0]).get("tenant", ""))


def decode_manifest(text: bytes) -> Manifest:
    """Read a manifest. Raises `BackupInvalid`."""
    try:
        found: JsonValue = json.loads(text)
        version = found.get("format") if isinstance(found, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise BackupInvalid(
                f"This backup has format {version} and this Slipstream reads format {FORMAT}: restore it with the version "
                "of Slipstream that wrote it, or a newer one."
            )
        return Manifest.model_validate(found)
    except (ValueError, ValidationError) as error:
        raise BackupInvalid("The backup's manifest.json is damaged: restore another backup.") from error
