"""`publish_folder`: what is visible, and when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.api_app import write_adapter

from adapter_registry.errors import InvalidName
from adapter_registry.records import AdapterDraft, AdapterVersion, canonical_manifest
from slipstream.errors import AdapterRejected, Conflict
from slipstream.publishing import publish_folder, run_to_end
from slipstream.testing import FAKE_BASE, MemoryBlobs, MemoryStore


class NotingStore(MemoryStore):
    """Notes the order of its calls."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    async def claim_blobs(self, tenant: str, sha256s: Iterable[str]) -> None:
        """As the store."""
        self.calls.append("claim")
        await super().claim_blobs(tenant, sha256s)

    async def publish(self, draft: AdapterDraft) -> tuple[AdapterVersion, bool]:
        """As the store."""
        self.calls.append("publish")
        return await super().publish(draft)


class NotingBlobs(MemoryBlobs):
    """Notes the order of its calls; `stuck` keeps them from ending."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls
        self.stuck = False

    async def put_bytes(self, tenant: str, sha256: str, data: bytes) -> None:
        """As the blobs."""
        self.calls.append("put")
        if self.stuck:
            await asyncio.Event().wait()
        await super().put_bytes(tenant, sha256, data)


class Diary:
    """A store and blobs that note into one list."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.store = NotingStore(self.calls)
        self.blobs = NotingBlobs(self.calls)


async def publish(diary: Diary, folder: Path, name: str = "sql") -> tuple[AdapterVersion, bool]:
    return await publish_folder(
        folder, name, "demo", FAKE_BASE, store=diary.store, blobs=diary.blobs, created_by="key_1"
    )


async def test_blobs_are_claimed_then_put_then_published(tmp_path: Path) -> None:
    diary = Diary()
    version, is_new = await publish(diary, write_adapter(tmp_path / "lora"))
    assert is_new
    assert diary.calls == ["claim", "put", "put", "put", "publish"]
    assert version.created_by == "key_1"
    manifest = await diary.blobs.get_bytes("demo", version.digest.removeprefix("sha256:"))
    assert manifest == canonical_manifest(version.files)


async def test_cancelled_halfway_nothing_is_visible(tmp_path: Path) -> None:
    diary = Diary()
    diary.blobs.stuck = True
    task = asyncio.create_task(publish(diary, write_adapter(tmp_path / "lora")))
    async with asyncio.timeout(10):
        while "put" not in diary.calls:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await diary.store.list("demo") == []


@pytest.mark.parametrize(
    ("name", "error"), [("base-1b", Conflict), (FAKE_BASE.id, InvalidName), ("Bad Name", InvalidName)]
)
async def test_names_are_checked_before_any_work(tmp_path: Path, name: str, error: type[Exception]) -> None:
    diary = Diary()
    with pytest.raises(error):
        await publish(diary, tmp_path / "not-even-there", name)
    assert diary.calls == []


async def test_a_refused_folder_touches_nothing(tmp_path: Path) -> None:
    diary = Diary()
    with pytest.raises(AdapterRejected):
        await publish(diary, write_adapter(tmp_path / "lora", nan=True))
    assert diary.calls == []


async def test_cancellation_waits_for_the_thread() -> None:
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(5)
        ended.set()

    task = asyncio.create_task(run_to_end(work))
    await asyncio.to_thread(started.wait, 5)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
