"""`MemoryBlobs`: the registry's `BlobStore` without a bucket. It passes the same contract tests as `ObstoreBlobs`."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

from adapter_registry.errors import BlobCorrupt, BlobMissing
from adapter_registry.records import check_name, check_sha256
from adapter_registry.store import BlobStore


class MemoryBlobs(BlobStore):
    """Blobs in a dictionary. `content` is public so that a test may lose or damage one."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, str], bytes] = {}

    async def put_file(self, tenant: str, sha256: str, path: Path) -> None:
        """Store a file's content."""
        await self.put_bytes(tenant, sha256, path.read_bytes())  # noqa: ASYNC240 - test files are small

    async def put_bytes(self, tenant: str, sha256: str, data: bytes) -> None:
        """Store a small blob."""
        key = _key(tenant, sha256)
        self.content[key] = _checked(sha256, data)

    async def exists(self, tenant: str, sha256: str) -> bool:
        """Whether the blob is there."""
        return _key(tenant, sha256) in self.content

    async def get_bytes(self, tenant: str, sha256: str) -> bytes:
        """A small blob, checked. Raises `BlobMissing` or `BlobCorrupt`."""
        data = self.content.get(_key(tenant, sha256))
        if data is None:
            raise BlobMissing(f"The blob {sha256} is not in the blob store.")
        return _checked(sha256, data)

    async def fetch_file(self, tenant: str, sha256: str, destination: Path) -> None:
        """Write a blob into a file, checked; corrupt content is never visible at `destination`."""
        destination.write_bytes(await self.get_bytes(tenant, sha256))  # noqa: ASYNC240 - test files are small

    async def delete(self, tenant: str, sha256: str) -> None:
        """Remove a blob; no error when it is not there."""
        self.content.pop(_key(tenant, sha256), None)

    async def list(self, tenant: str) -> AsyncIterator[str]:
        """The sha256 of every blob of a tenant."""
        check_name(tenant, "tenant")
        for owner, sha256 in sorted(self.content):
            if owner == tenant:
                yield sha256


def _key(tenant: str, sha256: str) -> tuple[str, str]:
    return check_name(tenant, "tenant"), check_sha256(sha256)


def _checked(sha256: str, data: bytes) -> bytes:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BlobCorrupt(f"The content of blob {sha256} does not match its sha256.")
    return data
