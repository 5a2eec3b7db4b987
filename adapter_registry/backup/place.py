"""Where backups lie: a folder, or a bucket.

blobs/{tenant}/blobs/{two hex digits}/{sha256}   content, shared by all backups of the place
backups/{id}/{tenant}.jsonl                      a tenant's records
backups/{id}/manifest.json                       written last: without it there is no backup
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from adapter_registry.backup.records import Manifest, decode_manifest
from adapter_registry.blobs import BUCKETS, ObstoreBlobs, open_bucket
from adapter_registry.errors import BackupInvalid, StoreUnavailable
from adapter_registry.records import check_name

_ID = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z")


class BackupPlace:
    """One place with any number of backups; each blob is there once, whatever number of them name it."""

    def __init__(self, store: Any, blobs: ObstoreBlobs, *, is_local: bool) -> None:
        self._store = store
        self._is_local = is_local
        self.blobs = blobs

    @classmethod
    def from_url(cls, url: str, *, make: bool = False) -> BackupPlace:
        """A place at a path, `file://…`, `s3://bucket/prefix`, `gs://…` or `az://…`; `make` makes a folder.

        Raises `BackupInvalid` for anything else, and for a folder that is not there.
        """
        parts = urlsplit(url)
        if parts.scheme in BUCKETS:
            address = url.rstrip("/")
            return cls(open_bucket(address), ObstoreBlobs.from_url(f"{address}/blobs"), is_local=False)
        if parts.scheme not in ("", "file") or (parts.scheme and parts.netloc not in ("", "localhost")):
            raise BackupInvalid(f"There is no place for backups at {url[:80]!r}: use a folder, s3://, gs:// or az://.")
        folder = (Path(unquote(parts.path)) if parts.scheme else Path(url)).expanduser().resolve()
        if make:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        elif not folder.is_dir():
            raise BackupInvalid(f"There is no folder {folder}.")
        blobs = ObstoreBlobs.from_url((folder / "blobs").as_uri())
        return cls(LocalStore(prefix=folder, automatic_cleanup=True), blobs, is_local=True)

    async def ids(self) -> Sequence[str]:
        """Of the backups that are whole, oldest first."""
        return [id_ for id_ in await self._folders() if await self._exists(_manifest(id_))]

    async def unfinished(self) -> Sequence[str]:
        """Of those that were broken off, or are being written now."""
        return [id_ for id_ in await self._folders() if not await self._exists(_manifest(id_))]

    async def manifest(self, id_: str | None = None) -> Manifest:
        """Of a backup, or of the newest. Raises `BackupInvalid` when there is none, or none that this version reads."""
        found = await self.ids()
        if not found:
            raise BackupInvalid(
                "There is no whole backup: one that was broken off has no manifest.json and is not used."
            )
        if id_ is not None and id_ not in found:
            raise BackupInvalid(f"There is no backup {id_[:40]!r}; there are {', '.join(found[-10:])}.")
        return decode_manifest(await self.get(_manifest(id_ or found[-1])))

    async def records(self, id_: str, tenant: str) -> bytes:
        """A tenant's file. Raises `BackupInvalid` when it is not there."""
        return await self.get(_records(id_, tenant))

    async def put_records(self, id_: str, tenant: str, data: bytes) -> None:
        """Write a tenant's file."""
        await self.put(_records(id_, tenant), data)

    async def finish(self, manifest: Manifest) -> None:
        """Make a backup of what was written."""
        if self._is_local:
            await asyncio.to_thread(os.sync)  # a power cut must not leave a manifest of what never reached the disk
        await self.put(_manifest(manifest.id), manifest.model_dump_json(indent=2).encode())

    async def put(self, path: str, data: bytes) -> None:
        """Write a file in one step: it is there with all of it, or not at all."""
        async with _answering():
            await obstore.put_async(self._store, path, data)

    async def get(self, path: str) -> bytes:
        """Read one. Raises `BackupInvalid` when it is not there."""
        async with _answering():
            return bytes(await (await obstore.get_async(self._store, path)).bytes_async())

    async def remove(self, id_: str) -> None:
        """A backup's records; its manifest first, so that what a broken-off removal leaves is no backup."""
        async with _answering():
            if await self._exists(_manifest(id_)):
                await obstore.delete_async(self._store, _manifest(id_))
            async for page in obstore.list(self._store, prefix=f"backups/{id_}"):
                await obstore.delete_async(self._store, [entry["path"] for entry in page])

    async def tenants_with_blobs(self) -> Sequence[str]:
        """Whose blobs there are."""
        return await self._under("blobs")

    async def _folders(self) -> Sequence[str]:
        return [name for name in await self._under("backups") if _ID.fullmatch(name)]

    async def _under(self, prefix: str) -> Sequence[str]:
        async with _answering():
            found = await obstore.list_with_delimiter_async(self._store, prefix=prefix)
        return sorted(each.rpartition("/")[2] for each in found["common_prefixes"])

    async def _exists(self, path: str) -> bool:
        async with _answering():
            try:
                await obstore.head_async(self._store, path)
                return True
            except FileNotFoundError:
                return False


def _manifest(id_: str) -> str:
    return f"backups/{id_}/manifest.json"


def _records(id_: str, tenant: str) -> str:
    return f"backups/{id_}/{check_name(tenant, 'tenant')}.jsonl"


@asynccontextmanager
async def _answering() -> AsyncIterator[None]:
    """The one place where obstore's errors become ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise BackupInvalid("A part of the backup is missing.") from error
    except PermissionError as error:
        raise StoreUnavailable("The place of the backups may not be written or read: check its rights.") from error
    except (BaseError, OSError) as error:
        raise StoreUnavailable(
            "The place of the backups cannot be reached or did not answer in time; try again."
        ) from error
