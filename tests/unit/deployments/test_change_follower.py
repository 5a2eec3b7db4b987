"""What a replica makes of changes, while the registry comes and goes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapter_registry.changes import Change
from adapter_registry.errors import StoreUnavailable
from deployments import change_follower
from deployments.adapter_source import BlobAdapterSource
from slipstream.errors import EngineFailed
from slipstream.protocol import AdapterRef
from slipstream.testing import MemoryBlobs, MemoryChanges, MemoryStore

OLD, NEW = "sha256:" + "0" * 64, "sha256:" + "1" * 64


@dataclass
class NotingEngine:
    """Notes what it is told, but for one that makes it fail."""

    fails_at: str
    told: list[object] = field(default_factory=list)

    async def prefetch(self, ref: AdapterRef, instead_of: str) -> None:
        """One that will be asked for."""
        if ref.digest == self.fails_at:
            raise EngineFailed("stopped")
        self.told.append((ref, instead_of))

    async def forget(self, ref: AdapterRef) -> None:
        """One that is gone."""
        self.told.append(ref.digest)


class AwayAtTimes(MemoryChanges):
    """Does not answer the first times."""

    failures = 2

    async def listen(self, after: str, wait_s: float) -> tuple[Sequence[Change], str]:
        """As the feed, when it is there."""
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("away")
        return await super().listen(after, wait_s)


async def test_changes_reach_the_engine_and_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_follower, "_PAUSE_S", 0.01)
    cached = tmp_path / "acme" / OLD.removeprefix("sha256:")
    cached.mkdir(parents=True)
    (cached / "adapter_config.json").write_text("{}")
    feed, engine = AwayAtTimes(MemoryStore()), NotingEngine(fails_at=OLD)
    source = BlobAdapterSource(MemoryBlobs(), tmp_path, 1 << 20)
    following = asyncio.create_task(change_follower.follow(feed, engine, source))
    await asyncio.sleep(0.01)  # it has its place, and the registry is away
    await feed.tell(Change(tenant="acme", coming=NEW, instead_of=OLD))
    await feed.tell(Change(tenant="acme", coming=OLD, instead_of=NEW))  # fails: the next ones are followed
    await feed.tell(Change(tenant="acme", gone=OLD))
    async with asyncio.timeout(10):
        while cached.exists():
            await asyncio.sleep(0.01)
    assert engine.told == [(AdapterRef("acme", NEW), OLD), OLD]
    following.cancel()
    assert not list(tmp_path.glob(".*"))  # noqa: ASYNC240 - a test
