"""Where a replica gets adapter files: the blob store, through a cache on this machine's disk.

The cache holds whole, checked folders only: a version is downloaded into a scratch folder and renamed. Folders are
hard-linked or copied into the engine's destination, so the cache may drop one at any moment without hurting a reader.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from adapter_registry.errors import RegistryError
from adapter_registry.records import FileEntry
from adapter_registry.store import BlobStore
from slipstream.errors import AdapterUnavailable
from slipstream.protocol import AdapterRef

_FILES = TypeAdapter(tuple[FileEntry, ...])
_SCRATCH = ".scratch-"  # also the engine's prefix, for the folders that it has adapters fetched into
_ABANDONED_S = 3600.0  # older than any fetch: its process was killed


class BlobAdapterSource:
    """The engine's `AdapterSource` over a `BlobStore`; bounded by bytes, least recently used first."""

    def __init__(self, blobs: BlobStore, cache: Path, capacity_bytes: int) -> None:
        self._blobs = blobs
        self._cache = cache
        self._capacity_bytes = capacity_bytes
        self._flights: dict[AdapterRef, asyncio.Task[Path]] = {}

    async def fetch(self, ref: AdapterRef, destination: Path) -> None:
        """Put the version's files into `destination`. Raises `AdapterUnavailable`."""
        while True:
            folder = await self._cached(ref)
            try:
                await asyncio.to_thread(_link_files, folder, destination)
            except FileNotFoundError:
                continue  # evicted between the two steps, by us or by another replica of this machine
            return

    async def forget(self, ref: AdapterRef) -> None:
        """Remove it from this machine's disk; unknown ones are no error."""
        await asyncio.to_thread(_remove_whole, self._folder(ref), self._cache)

    def _folder(self, ref: AdapterRef) -> Path:
        return self._cache / ref.tenant / ref.digest.removeprefix("sha256:")

    async def _cached(self, ref: AdapterRef) -> Path:
        flight = self._flights.get(ref)
        if flight is None:
            flight = asyncio.create_task(self._load(ref))
            self._flights[ref] = flight
            flight.add_done_callback(lambda done: self._landed(ref, done))
        # Shielded: one waiter that gives up must not fail the others.
        return await asyncio.shield(flight)

    def _landed(self, ref: AdapterRef, flight: asyncio.Task[Path]) -> None:
        self._flights.pop(ref, None)
        if not flight.cancelled():
            flight.exception()  # looked at, so that a flight whose waiters have all left is not reported as forgotten

    async def _load(self, ref: AdapterRef) -> Path:
        final = self._folder(ref)
        if final.is_dir():
            await asyncio.to_thread(os.utime, final)  # its modification time is when it was last used
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._cache))
        try:
            size = await self._download(ref, scratch)
            await asyncio.to_thread(evict, self._cache, self._capacity_bytes - size)
            _publish(scratch, final)
        except (RegistryError, OSError) as error:
            raise AdapterUnavailable(
                "The adapter's files could not be fetched. Try again; if it lasts, publish it again."
            ) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
        return final

    async def _download(self, ref: AdapterRef, scratch: Path) -> int:
        manifest = await self._blobs.get_bytes(ref.tenant, ref.digest.removeprefix("sha256:"))
        try:
            files = _FILES.validate_python(json.loads(manifest))
        except (ValueError, ValidationError) as error:
            raise AdapterUnavailable("The adapter's list of files is damaged. Publish it again.") from error
        for entry in files:
            await self._blobs.fetch_file(ref.tenant, entry.sha256, scratch / entry.path)
        return sum(entry.size for entry in files)


def _publish(scratch: Path, final: Path) -> None:
    try:
        scratch.rename(final)
    except OSError:
        if not final.is_dir():  # another replica was first: its files are the same ones, by digest
            raise


def _link_files(folder: Path, destination: Path) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    for source in folder.iterdir():
        target = destination / source.name
        try:
            os.link(source, target)
        except FileExistsError:
            continue
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, target)


def remove_abandoned(cache: Path) -> None:
    """Remove the scratch folders of killed processes; other replicas of this machine may be using theirs."""
    for left in cache.glob(_SCRATCH + "*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)


def evict(cache: Path, capacity_bytes: int) -> None:
    """Drop the least recently used adapters until the rest fits `capacity_bytes`."""
    entries = []
    for folder in cache.glob("[!.]*/*"):
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            entries.append((folder.stat().st_mtime, size, folder))
        except FileNotFoundError:  # another replica is evicting too
            continue
    total = sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total <= capacity_bytes:
            return
        _remove_whole(folder, cache)
        total -= size


def _remove_whole(folder: Path, cache: Path) -> None:
    """Rename before removing, so that nobody ever sees half an adapter."""
    grave = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=cache))
    try:
        folder.rename(grave / "evicted")
    except FileNotFoundError:
        pass
    finally:
        shutil.rmtree(grave, ignore_errors=True)
