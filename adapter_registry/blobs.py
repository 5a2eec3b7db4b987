"""`ObstoreBlobs`: content in a folder or bucket, per tenant, under its sha256."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, from_url

from adapter_registry.errors import BlobCorrupt, BlobMissing, StoreUnavailable
from adapter_registry.records import check_name, check_sha256
from adapter_registry.store import BlobStore

_CHUNK_BYTES = 8 * 1024 * 1024
# Per request; obstore retries and resumes by itself. Plain HTTP is for whoever names such an endpoint, as MinIO's users do.
_CLIENT_OPTIONS: Any = {"connect_timeout": "5s", "timeout": "60s", "allow_http": True}
BUCKETS = ("s3", "gs", "az")
_T = TypeVar("_T")


class ObstoreBlobs(BlobStore):
    """Blobs at `{tenant}/blobs/{first two hex digits}/{sha256}` of an obstore store."""

    def __init__(self, store: Any) -> None:
        self._store = store
        # Hashing and file writes: gigabytes, so never on the event loop.
        self._executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="slipstream-blobs")

    @classmethod
    def from_url(cls, url: str) -> ObstoreBlobs:
        """A store at `file:///folder`, `s3://bucket/prefix`, `gs://…`, `az://…` or `memory://`.

        Credentials and regions of clouds come from their usual environment variables.
        """
        parts = urlsplit(url)
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
                raise ValueError("A blob folder's URL needs three slashes and an absolute path: file:///var/lib/blobs.")
            return cls(LocalStore(prefix=Path(unquote(parts.path)), mkdir=True))
        if parts.scheme == "memory":
            return cls(MemoryStore())
        if parts.scheme not in BUCKETS:
            raise ValueError(f"Blobs cannot be kept at {parts.scheme[:20]!r}: use file, s3, gs, az or memory.")
        return cls(open_bucket(url))

    async def put_file(self, tenant: str, sha256: str, path: Path) -> None:
        """Store a file's content (streamed). Nothing is visible under the name until all of it is there."""
        key = _key(tenant, sha256)
        # Hashed before anything is sent. The second read comes from the page cache, and wrong content never reaches the
        # bucket, not even as an unfinished upload.
        digest, size = await self._in_thread(lambda: _hash_file(path))
        _check(digest, sha256)
        await self._put(key, sha256, path, size)

    async def put_bytes(self, tenant: str, sha256: str, data: bytes) -> None:
        """Store a small blob."""
        key = _key(tenant, sha256)
        _check(hashlib.sha256(data).hexdigest(), sha256)
        await self._put(key, sha256, data, len(data))

    async def exists(self, tenant: str, sha256: str) -> bool:
        """Whether the blob is there."""
        return await self._size(_key(tenant, sha256), sha256) is not None

    async def get_bytes(self, tenant: str, sha256: str) -> bytes:
        """A small blob, checked. Raises `BlobMissing` or `BlobCorrupt`."""
        key = _key(tenant, sha256)
        async with _answering(sha256):
            data = bytes(await (await obstore.get_async(self._store, key)).bytes_async())
        _check(hashlib.sha256(data).hexdigest(), sha256)
        return data

    async def fetch_file(self, tenant: str, sha256: str, destination: Path) -> None:
        """Stream a blob into a file, checked; a partial or corrupt download is never visible at `destination`."""
        key = _key(tenant, sha256)
        async with _answering(sha256):
            chunks = aiter((await obstore.get_async(self._store, key)).stream(min_chunk_size=_CHUNK_BYTES))
        download = await self._in_thread(lambda: _Download(destination))
        try:
            while True:
                async with _answering(sha256):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                # One chunk in flight, so a slow disk holds the network back instead of filling the memory.
                await self._in_thread(lambda data=chunk: download.write(data))  # type: ignore[misc]  # bound now
            await self._in_thread(lambda: download.commit(sha256))
        finally:
            # Not in the executor: a cancelled fetch must clean up too, and may not wait for anything.
            download.discard()

    async def delete(self, tenant: str, sha256: str) -> None:
        """Remove a blob; no error when it is not there."""
        key = _key(tenant, sha256)
        async with _answering(sha256):
            try:
                await obstore.delete_async(self._store, key)
            except FileNotFoundError:
                return

    async def list(self, tenant: str) -> AsyncIterator[str]:
        """The sha256 of every blob of a tenant."""
        prefix = f"{check_name(tenant, 'tenant')}/blobs"
        pages = aiter(obstore.list(self._store, prefix=prefix))
        while True:
            async with _answering(""):
                page = await anext(pages, None)
            if page is None:
                return
            for entry in page:
                yield entry["path"].rpartition("/")[2]

    async def _put(self, key: str, sha256: str, source: Path | bytes, size: int) -> None:
        # A local put is written beside its name and renamed, and a bucket shows an object only when it is complete.
        if await self._size(key, sha256) == size:
            return
        async with _answering(sha256):
            await obstore.put_async(self._store, key, source)

    async def _size(self, key: str, sha256: str) -> int | None:
        async with _answering(sha256):
            try:
                return int((await obstore.head_async(self._store, key))["size"])
            except FileNotFoundError:
                return None

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def open_bucket(url: str, retry_timeout_s: float = 180.0) -> Any:
    """An obstore store at `s3://bucket/prefix`, `gs://…` or `az://…`; credentials come from the environment.

    Requests are tried again until `retry_timeout_s` after the first try.
    """
    retries: Any = {"retry_timeout": timedelta(seconds=retry_timeout_s)}
    return from_url(url, client_options=_CLIENT_OPTIONS, retry_config=retries)


class _Download:
    """A file beside its destination that takes the name only when its hash is right."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        handle, name = tempfile.mkstemp(prefix=f".{destination.name[:100]}.", suffix=".part", dir=destination.parent)
        self._file = os.fdopen(handle, "wb", buffering=0)
        self._path = Path(name)
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Add to the file and to its hash."""
        self._hash.update(data)
        view = memoryview(data)
        while view:  # an unbuffered write may be a short one
            view = view[self._file.write(view) :]

    def commit(self, sha256: str) -> None:
        """Check, then make visible in one step that survives a power cut."""
        _check(self._hash.hexdigest(), sha256)
        os.fsync(self._file.fileno())
        self._path.replace(self._destination)
        folder = os.open(self._destination.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Close, and remove what was not committed."""
        self._file.close()
        self._path.unlink(missing_ok=True)


@asynccontextmanager
async def _answering(sha256: str) -> AsyncIterator[None]:
    """The one place where obstore's errors become ours; the cause stays attached for the logs, not for clients."""
    try:
        yield
    except FileNotFoundError as error:  # what obstore raises for an object that is not there
        raise BlobMissing(f"The blob {sha256} is not in the blob store.") from error
    except (BaseError, OSError) as error:
        raise StoreUnavailable("The blob store cannot be reached or did not answer in time; try again.") from error


def _key(tenant: str, sha256: str) -> str:
    """Both parts are checked, so no path can leave its tenant's folder."""
    return f"{check_name(tenant, 'tenant')}/blobs/{check_sha256(sha256)[:2]}/{sha256}"


def _check(found: str, sha256: str) -> None:
    if found != sha256:
        raise BlobCorrupt(f"The content of blob {sha256} does not match its sha256.")


def _hash_file(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()
