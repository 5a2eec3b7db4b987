"""`publish_folder`: what is visible, and when."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from support.api_app import write_adapter

from adapter_registry.errors import InvalidName
from adapter_registry.records import AdapterDraft, AdapterVersion, canonical_manifest
from slipstream.errors import AdapterRejected
from slipstream.publishing import mend, publish_folder, run_to_end, sweep_blobs
from slipstream.testing import FAKE_BASE, ManualClock, MemoryBlobs, MemoryStore


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
    "name",
    [FAKE_BASE.id, "Bad Name"],
)
async def test_names_are_checked_before_any_work(tmp_path: Path, name: str) -> None:
    diary = Diary()
    with pytest.raises(InvalidName):
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


async def test_a_sweep_takes_what_nothing_refers_to_any_more(tmp_path: Path) -> None:
    clock = ManualClock()
    store, blobs = MemoryStore(clock=clock), MemoryBlobs()

    async def put(name: str, tenant: str, seed: int) -> AdapterVersion:
        folder = write_adapter(tmp_path / f"{tenant}-{name}", seed=seed)
        return (await publish_folder(folder, name, tenant, FAKE_BASE, store=store, blobs=blobs, created_by="k"))[0]

    gone = [await put("gone", "acme", 1), await put("gone", "demo", 2)]
    await put("kept", "acme", 3)
    for version in gone:
        await store.delete(version.tenant, version.name)
    assert await sweep_blobs(store, blobs, 3600) == 0
    clock.advance(3601)
    everything = len(blobs.content)
    # The two of acme share their configuration, which stays: weights and manifest go. Of demo's all three do.
    assert await sweep_blobs(store, blobs, 3600) == 5
    assert len(blobs.content) == everything - 5
    assert await sweep_blobs(store, blobs, 0) == 0
    await put("gone", "demo", 2)  # nothing is left marked: it can be published again


async def test_a_sweep_goes_on_until_nothing_is_left(tmp_path: Path) -> None:
    class InBatches(MemoryStore):
        async def begin_sweep(self, tenant: str, older_than_s: float) -> Sequence[str]:
            found = await super().begin_sweep(tenant, older_than_s)
            mine = self._look(tenant)
            for sha256 in found[1:]:
                mine.garbage[sha256] = mine.deleting.pop(sha256)
            return found[:1]

    store, blobs = InBatches(), MemoryBlobs()
    await store.claim_blobs("acme", [character * 64 for character in "abc"])
    assert await sweep_blobs(store, blobs, 0) == 3


async def test_orphans_are_found_and_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.publishing._ADOPTED_AT_ONCE", 2)
    diary = Diary()
    version, _ = await publish(diary, write_adapter(tmp_path / "lora"))
    for text in ("a", "b", "c"):  # as a registry that was restored from yesterday would find them
        await diary.blobs.put_bytes("demo", hashlib.sha256(text.encode()).hexdigest(), text.encode())
    assert await mend(diary.store, diary.blobs) == 3
    assert await mend(diary.store, diary.blobs) == 0
    assert await sweep_blobs(diary.store, diary.blobs, 3600) == 0
    assert await sweep_blobs(diary.store, diary.blobs, 0) == 3
    assert {sha async for sha in diary.blobs.list("demo")} == set(version.blob_sha256s)
