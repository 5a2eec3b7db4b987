"""One suite for every `BlobStore`, and what only a folder or bucket can get wrong."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore as ObjectMemory
from support.drafts import sha
from support.s3_server import BUCKET, running_s3

from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.errors import BlobCorrupt, BlobMissing, InvalidName, StoreUnavailable
from adapter_registry.store import BlobStore
from slipstream.testing.memory_blobs import MemoryBlobs

BIG = "0123456789abcdef" * (1 << 20) + "end"  # 16 MiB and a bit: three chunks, a multipart upload


async def overwrite(blobs: BlobStore, tenant: str, sha256: str, data: bytes) -> None:
    """Damage a stored blob behind the store's back."""
    if isinstance(blobs, MemoryBlobs):
        blobs.content[tenant, sha256] = data
    else:
        assert isinstance(blobs, ObstoreBlobs)
        await obstore.put_async(blobs._store, f"{tenant}/blobs/{sha256[:2]}/{sha256}", data)


async def names(blobs: BlobStore, tenant: str = "acme") -> list[str]:
    return sorted([sha256 async for sha256 in blobs.list(tenant)])


def inside(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def s3() -> Iterator[Mapping[str, str]]:
    with running_s3() as environment:
        yield environment


@pytest.fixture(params=["memory", "obstore-memory", "obstore-folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlobStore:
    if request.param == "memory":
        return MemoryBlobs()
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3").items():
            monkeypatch.setenv(name, value)
        return ObstoreBlobs.from_url(f"s3://{BUCKET}/{secrets.token_hex(4)}/blobs")
    url = "memory://" if request.param == "obstore-memory" else (tmp_path / "a folder" / "blobs").as_uri()
    return ObstoreBlobs.from_url(url)


async def test_bytes_come_back(blobs: BlobStore) -> None:
    for text in ("hello", ""):
        await blobs.put_bytes("acme", sha(text), text.encode())
        assert await blobs.exists("acme", sha(text))
        assert await blobs.get_bytes("acme", sha(text)) == text.encode()


@pytest.mark.parametrize("text", ["small", "", BIG], ids=["small", "empty", "big"])
async def test_files_come_back(blobs: BlobStore, tmp_path: Path, folder: Path, text: str) -> None:
    await blobs.put_file("acme", sha(text), write(tmp_path / "source", text))
    destination = folder / "adapter_model.safetensors"
    destination.write_text("an older one")
    await blobs.fetch_file("acme", sha(text), destination)
    assert destination.read_text() == text
    assert inside(folder) == [destination]


async def test_putting_twice_and_at_once_is_putting_once(blobs: BlobStore, tmp_path: Path) -> None:
    source = write(tmp_path / "source", "hello")
    await asyncio.gather(*(blobs.put_file("acme", sha("hello"), source) for _ in range(8)))
    await blobs.put_bytes("acme", sha("hello"), b"hello")
    assert await names(blobs) == [sha("hello")]
    assert await blobs.get_bytes("acme", sha("hello")) == b"hello"


async def test_a_torn_blob_is_repaired_by_putting_again(blobs: BlobStore) -> None:
    await overwrite(blobs, "acme", sha("hello"), b"hel")
    await blobs.put_bytes("acme", sha("hello"), b"hello")
    assert await blobs.get_bytes("acme", sha("hello")) == b"hello"


async def test_content_under_a_wrong_hash_is_refused(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(BlobCorrupt):
        await blobs.put_bytes("acme", sha("promised"), b"delivered")
    with pytest.raises(BlobCorrupt):
        await blobs.put_file("acme", sha("promised"), write(tmp_path / "source", "delivered"))
    assert await names(blobs) == []
    assert not await blobs.exists("acme", sha("promised"))


async def test_a_missing_blob_is_missing(blobs: BlobStore, folder: Path) -> None:
    assert not await blobs.exists("acme", sha("a"))
    with pytest.raises(BlobMissing):
        await blobs.get_bytes("acme", sha("a"))
    with pytest.raises(BlobMissing):
        await blobs.fetch_file("acme", sha("a"), folder / "file")
    await blobs.delete("acme", sha("a"))
    assert await names(blobs) == []
    assert inside(folder) == []


@pytest.mark.parametrize("damaged", ["hellO", "hel", BIG], ids=["flipped", "cut", "longer"])
async def test_a_corrupt_blob_is_never_visible(blobs: BlobStore, folder: Path, damaged: str) -> None:
    await overwrite(blobs, "acme", sha("hello"), damaged.encode())
    kept = write(folder / "file", "as before")
    with pytest.raises(BlobCorrupt):
        await blobs.get_bytes("acme", sha("hello"))
    with pytest.raises(BlobCorrupt):
        await blobs.fetch_file("acme", sha("hello"), kept)
    assert kept.read_text() == "as before"
    assert inside(folder) == [kept]


async def test_deleting(blobs: BlobStore) -> None:
    for text in ("a", "b"):
        await blobs.put_bytes("acme", sha(text), text.encode())
    await blobs.delete("acme", sha("a"))
    await blobs.delete("acme", sha("a"))
    assert await names(blobs) == [sha("b")]


async def test_tenants_do_not_share_blobs(blobs: BlobStore, folder: Path) -> None:
    await blobs.put_bytes("acme", sha("a"), b"a")
    await blobs.put_bytes("acme2", sha("b"), b"b")
    assert await names(blobs, "acme") == [sha("a")]
    assert not await blobs.exists("acme2", sha("a"))
    with pytest.raises(BlobMissing):
        await blobs.get_bytes("acme2", sha("a"))
    with pytest.raises(BlobMissing):
        await blobs.fetch_file("acme2", sha("a"), folder / "file")
    await blobs.delete("acme2", sha("a"))
    assert await blobs.exists("acme", sha("a"))


@pytest.mark.parametrize(
    ("tenant", "sha256"), [("..", sha("a")), ("a/b", sha("a")), ("acme", "../x"), ("acme", "A" * 64)]
)
async def test_paths_stay_inside_the_tenant(blobs: BlobStore, tmp_path: Path, tenant: str, sha256: str) -> None:
    source = write(tmp_path / "source", "a")
    for attempt in (
        blobs.put_bytes(tenant, sha256, b"a"),
        blobs.put_file(tenant, sha256, source),
        blobs.get_bytes(tenant, sha256),
        blobs.fetch_file(tenant, sha256, tmp_path / "out"),
        blobs.exists(tenant, sha256),
        blobs.delete(tenant, sha256),
    ):
        with pytest.raises(InvalidName):
            await attempt
    with pytest.raises(InvalidName):
        await names(blobs, "..")


class _FailingStream:
    """A download that delivers one chunk and then does as it is told."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then
        self._chunks = iter([b"half of "])

    def __aiter__(self) -> _FailingStream:
        return self

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        outcome = self._then()
        if isinstance(outcome, Exception):
            raise outcome
        await asyncio.sleep(30)
        raise StopAsyncIteration


class _FailingGet:
    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then

    def stream(self, min_chunk_size: int) -> _FailingStream:
        assert min_chunk_size > 0
        return _FailingStream(self._then)


async def test_a_connection_lost_half_way_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def get(*_: object) -> _FailingGet:
        return _FailingGet(lambda: GenericError("s3://bucket/internal reset"))

    monkeypatch.setattr(obstore, "get_async", get)
    with pytest.raises(StoreUnavailable) as caught:
        await ObstoreBlobs(ObjectMemory()).fetch_file("acme", sha("a"), folder / "file")
    assert "bucket" not in str(caught.value)
    assert inside(folder) == []


async def test_a_partial_download_is_hidden_and_a_cancelled_one_is_cleaned_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalled = asyncio.Event()

    async def get(*_: object) -> _FailingGet:
        return _FailingGet(stalled.set)

    monkeypatch.setattr(obstore, "get_async", get)
    fetch = asyncio.create_task(ObstoreBlobs(ObjectMemory()).fetch_file("acme", sha("a"), folder / "file"))
    await asyncio.wait_for(stalled.wait(), 5)
    (partial,) = inside(folder)
    assert partial.name.startswith(".file.")
    assert partial.read_bytes() == b"half of "
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    assert inside(folder) == []


async def test_a_bucket_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    async def refuse(*_: object) -> None:
        raise GenericError("http://10.0.0.1/secret")

    for name in ("get_async", "head_async", "put_async", "delete_async"):
        monkeypatch.setattr(obstore, name, refuse)
    blobs = ObstoreBlobs(ObjectMemory())
    for attempt in (
        blobs.put_bytes("acme", sha("a"), b"a"),
        blobs.get_bytes("acme", sha("a")),
        blobs.fetch_file("acme", sha("a"), folder / "file"),
        blobs.exists("acme", sha("a")),
        blobs.delete("acme", sha("a")),
    ):
        with pytest.raises(StoreUnavailable) as caught:
            await attempt
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://x/y", "file://host/x", "folder", "file:relative", ""])
def test_urls_that_mean_nothing_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be kept|three slashes"):
        ObstoreBlobs.from_url(url)


async def test_the_layout_of_a_folder_is_what_the_documents_say(tmp_path: Path) -> None:
    await ObstoreBlobs.from_url((tmp_path / "b").as_uri()).put_bytes("acme", sha("a"), b"a")
    assert (tmp_path / "b" / "acme" / "blobs" / sha("a")[:2] / sha("a")).read_bytes() == b"a"
