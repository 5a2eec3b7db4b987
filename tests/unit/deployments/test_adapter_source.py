"""The adapter cache: single flight, whole folders only, bounded, and safe to evict from."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from adapter_registry.records import FileEntry, canonical_manifest
from deployments.adapter_source import BlobAdapterSource, evict, remove_abandoned
from slipstream.errors import AdapterUnavailable
from slipstream.protocol import AdapterRef
from slipstream.testing import MemoryBlobs


class CountingBlobs(MemoryBlobs):
    """Counts downloads, each taking a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches = 0

    async def fetch_file(self, tenant: str, sha256: str, destination: Path) -> None:
        self.fetches += 1
        await asyncio.sleep(0.01)
        await super().fetch_file(tenant, sha256, destination)


async def publish(blobs: MemoryBlobs, tenant: str = "acme", **files: bytes) -> AdapterRef:
    entries = []
    for name, data in files.items():
        sha256 = hashlib.sha256(data).hexdigest()
        await blobs.put_bytes(tenant, sha256, data)
        entries.append(FileEntry(path=f"{name}.json", size=len(data), sha256=sha256))
    manifest = canonical_manifest(entries)
    digest = hashlib.sha256(manifest).hexdigest()
    await blobs.put_bytes(tenant, digest, manifest)
    return AdapterRef(tenant, f"sha256:{digest}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_puts_the_files_where_they_are_wanted(tmp_path: Path) -> None:
    blobs = CountingBlobs()
    ref = await publish(blobs, a=b"1", b=b"2")
    source = BlobAdapterSource(blobs, tmp_path / "cache", 1 << 20)
    await source.fetch(ref, tmp_path / "x")
    await source.fetch(ref, tmp_path / "y")
    assert contents(tmp_path / "x") == contents(tmp_path / "y") == {"a.json": b"1", "b.json": b"2"}
    assert blobs.fetches == 2


async def test_a_second_process_finds_what_the_first_left(tmp_path: Path) -> None:
    blobs = CountingBlobs()
    ref = await publish(blobs, a=b"1")
    await BlobAdapterSource(blobs, tmp_path / "cache", 1 << 20).fetch(ref, tmp_path / "x")
    await BlobAdapterSource(MemoryBlobs(), tmp_path / "cache", 1 << 20).fetch(ref, tmp_path / "y")
    assert contents(tmp_path / "y") == {"a.json": b"1"}


async def test_many_at_once_download_once(tmp_path: Path) -> None:
    blobs = CountingBlobs()
    ref = await publish(blobs, a=b"1")
    source = BlobAdapterSource(blobs, tmp_path / "cache", 1 << 20)
    await asyncio.gather(*(source.fetch(ref, tmp_path / str(n)) for n in range(8)))
    assert blobs.fetches == 1


async def test_one_that_gives_up_does_not_fail_the_others(tmp_path: Path) -> None:
    blobs = CountingBlobs()
    ref = await publish(blobs, a=b"1")
    source = BlobAdapterSource(blobs, tmp_path / "cache", 1 << 20)
    first = asyncio.ensure_future(source.fetch(ref, tmp_path / "x"))
    second = asyncio.ensure_future(source.fetch(ref, tmp_path / "y"))
    await asyncio.sleep(0.001)
    first.cancel()
    await second
    assert contents(tmp_path / "y") == {"a.json": b"1"}
    assert blobs.fetches == 1


async def test_tenants_do_not_share_even_equal_content(tmp_path: Path) -> None:
    blobs = CountingBlobs()
    mine, theirs = await publish(blobs, "a", f=b"1"), await publish(blobs, "b", f=b"1")
    assert mine.digest == theirs.digest
    source = BlobAdapterSource(blobs, tmp_path / "cache", 1 << 20)
    await source.fetch(mine, tmp_path / "x")
    await blobs.delete("b", mine.digest.removeprefix("sha256:"))
    with pytest.raises(AdapterUnavailable):
        await source.fetch(theirs, tmp_path / "y")


async def test_a_missing_blob_leaves_nothing_behind(tmp_path: Path) -> None:
    blobs = CountingBlobs()
    ref = await publish(blobs, a=b"1", b=b"2")
    await blobs.delete(ref.tenant, hashlib.sha256(b"2").hexdigest())
    source = BlobAdapterSource(blobs, tmp_path / "cache", 1 << 20)
    with pytest.raises(AdapterUnavailable):
        await source.fetch(ref, tmp_path / "x")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    await blobs.put_bytes(ref.tenant, hashlib.sha256(b"2").hexdigest(), b"2")
    await source.fetch(ref, tmp_path / "x")


@pytest.mark.parametrize("manifest", [b"", b"{", b"{}", b'[{"path": "../x", "size": 1, "sha256": "00"}]', b"\xff"])
async def test_a_damaged_manifest_is_refused(tmp_path: Path, manifest: bytes) -> None:
    blobs = MemoryBlobs()
    digest = hashlib.sha256(manifest).hexdigest()
    await blobs.put_bytes("acme", digest, manifest)
    source = BlobAdapterSource(blobs, tmp_path / "cache", 1 << 20)
    with pytest.raises(AdapterUnavailable):
        await source.fetch(AdapterRef("acme", f"sha256:{digest}"), tmp_path / "x")


async def test_stays_within_its_bytes_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    blobs = CountingBlobs()
    refs = [await publish(blobs, a=bytes([n]) * 100) for n in range(3)]
    source = BlobAdapterSource(blobs, tmp_path / "cache", 250)
    for moment, ref in enumerate(refs[:2]):
        await source.fetch(ref, tmp_path / f"x{moment}")
        os.utime(tmp_path / "cache" / "acme" / ref.digest.removeprefix("sha256:"), (moment, moment))
    await source.fetch(refs[0], tmp_path / "again")  # used: now the other one is the oldest
    await source.fetch(refs[2], tmp_path / "x2")
    kept = {path.name for path in (tmp_path / "cache" / "acme").iterdir()}
    assert kept == {refs[0].digest.removeprefix("sha256:"), refs[2].digest.removeprefix("sha256:")}
    assert contents(tmp_path / "x1") == {"a.json": b"\x01" * 100}  # readers keep what they were given


def test_evicting_an_empty_cache_is_nothing(tmp_path: Path) -> None:
    evict(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    for name in (".scratch-old", ".scratch-new", "acme"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (".scratch-old", "acme"):
        os.utime(tmp_path / name, (0, 0))
    remove_abandoned(tmp_path)
    remove_abandoned(tmp_path / "not-there-yet")
    assert {path.name for path in tmp_path.iterdir()} == {".scratch-new", "acme"}
