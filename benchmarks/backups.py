"""What a backup costs: for how long Redis serves nobody else while it reads, and how long backup and restore take; a real
Redis server, blobs of a few bytes."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from adapter_registry.backup.parallel import for_each
from adapter_registry.backup.place import BackupPlace
from adapter_registry.backup.reading import Restore
from adapter_registry.backup.records import encode_items
from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.backup.snapshot import take_snapshot
from adapter_registry.backup.writing import back_up
from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.records import AdapterDraft, FileEntry, canonical_manifest
from adapter_registry.redis_store import RedisStore
from benchmarks.registry import draft
from benchmarks.report import table

MOST_WITH_BLOBS = 1000  # beyond, writing them takes longer than it is worth


def small(made: AdapterDraft) -> tuple[AdapterDraft, dict[str, bytes]]:
    """The same with contents of a few bytes, and these by sha256."""
    contents: dict[str, bytes] = {}

    def shrunk(entry: FileEntry) -> FileEntry:
        data = entry.sha256.encode()
        sha = hashlib.sha256(data).hexdigest()
        contents[sha] = data
        return FileEntry(path=entry.path, size=len(data), sha256=sha)

    files, cards = (tuple(map(shrunk, entries)) for entries in (made.files, made.attachments))
    version = made.model_copy(update={"files": files, "attachments": cards})
    contents[version.digest.removeprefix("sha256:")] = canonical_manifest(files)
    return version, contents


async def fill(store: RedisStore, blobs: ObstoreBlobs | None, adapters: int) -> None:
    """One tenant with so many adapters, the worst case. Without `blobs`, records alone."""

    async def publish(i: int) -> None:
        version, contents = small(draft("acme", f"adapter-{i}", i))
        await store.claim_blobs("acme", version.blob_sha256s)
        if blobs is not None:
            await asyncio.gather(*(blobs.put_bytes("acme", sha, data) for sha, data in contents.items()))
        await store.publish(version)

    await for_each(range(adapters), publish, 16)


async def longest_command(data: RegistryData) -> float:
    """Milliseconds of the longest one that Redis noted: nobody else is served meanwhile."""
    noted = await data._command("SLOWLOG", "GET", "128")  # id, when, microseconds …
    return max((each[2] for each in noted), default=0) / 1000


async def measure(url: str, adapters: int) -> list[str]:
    """One row."""
    store, data = RedisStore.from_url(url), RegistryData.from_url(url, timeout_s=60)
    await data._command("FLUSHALL")
    with tempfile.TemporaryDirectory() as folder:
        blobs = ObstoreBlobs.from_url((Path(folder) / "blobs").as_uri())
        with_blobs = adapters <= MOST_WITH_BLOBS
        await fill(store, blobs if with_blobs else None, adapters)
        await data._command("CONFIG", "SET", "slowlog-log-slower-than", "200")
        await data._command("SLOWLOG", "RESET")
        began = time.perf_counter()
        snapshot = await take_snapshot(data, "acme", await data.keys())
        read_s = time.perf_counter() - began
        longest_ms = await longest_command(data)
        times = await timed(data, blobs, Path(folder)) if with_blobs else []
    await store.close()
    await data.close()
    assert len(snapshot.adapters) == adapters
    size = len(encode_items(snapshot.kept)) / 1e6
    shown = [f"{taken:.1f}" for taken in times] or ["–"] * 3
    return [f"{adapters:,}", f"{size:.1f}", f"{longest_ms:.0f}", f"{read_s:.1f}", *shown]


async def timed(data: RegistryData, blobs: ObstoreBlobs, folder: Path) -> list[float]:
    """Seconds of a first backup, a second one, and a restore that finds all blobs in place."""
    place = BackupPlace.from_url(str(folder / "place"), make=True)
    restore = Restore(data, blobs, place)
    works: list[Callable[[], Awaitable[object]]] = [
        lambda: back_up(data, blobs, place),
        lambda: back_up(data, blobs, place),
        lambda: restore.run(replace=True, trust_blobs=True),
    ]
    times = []
    for work in works:
        began = time.perf_counter()
        await work()
        times.append(time.perf_counter() - began)
    return times


def main(
    url: Annotated[str, typer.Option(help="An empty Redis server; all of it is removed.")],
    sizes: Annotated[str, typer.Option(help="Adapters of the one tenant.")] = "100,1000,10000",
) -> None:
    """Time backups and restores of a tenant with many adapters."""
    rows = [asyncio.run(measure(url, int(size))) for size in sizes.split(",")]
    heads = [
        "adapters",
        "records, MB",
        "longest command, ms",
        "reading, s",
        "first backup, s",
        "second, s",
        "restore, s",
    ]
    print(table(heads, rows))
