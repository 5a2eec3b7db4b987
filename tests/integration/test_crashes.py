"""kill -9 at every step of what changes the registry: of the process that does it, and of Redis under it.

Steps are enumerated, not sampled: an act is done once to count them, and then again from the same beginning for each of them,
struck just before and just after. Whatever happened: nothing half-done is visible, nothing acknowledged is lost, the same act
done again ends as if nothing had happened, and the sweep leaves what is referred to and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import acts
from support.acts import NAME, TENANT
from support.api_app import write_adapter
from support.crashing import Act, Ending, Fault, World, perform
from support.redis_server import RedisServer, running_redis

from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.errors import NotPublished
from adapter_registry.records import AdapterSummary, canonical_manifest
from adapter_registry.redis_imports import RedisImports
from adapter_registry.redis_store import RedisStore
from adapter_registry.scripts import TenantKeys
from slipstream.publishing import sweep_blobs

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Its log is written before it answers: what it has acknowledged outlives it."""
    with running_redis() as found:
        yield found


@dataclass
class Registry:
    """A registry with two versions, `prod` on the first of them, and two more folders to publish."""

    server: RedisServer
    root: Path

    @property
    def blob_url(self) -> str:
        return (self.root / "blobs").as_uri()

    def folder(self, seed: int) -> Path:
        path = self.root / f"lora-{seed}"
        return path if path.exists() else write_adapter(path, seed=seed)

    def begin(self) -> None:
        """Back to the beginning."""
        self.server.call("FLUSHALL")
        shutil.rmtree(self.root / "blobs", ignore_errors=True)
        for seed in (1, 2):
            assert self.do(acts.publish, seed).answer == seed
        asyncio.run(self._with(lambda world: world.store.set_alias(TENANT, NAME, "prod", 2)))
        asyncio.run(self._with(lambda world: world.store.set_alias(TENANT, NAME, "prod", 1)))

    def do(self, act: Act, seed: int = 3, fault: Fault | None = None) -> Ending:
        return perform(act, self.server.url, self.blob_url, self.folder(seed), fault)

    def check(self) -> AdapterSummary | None:
        """What must hold at any moment. Returns what is visible."""
        found: AdapterSummary | None = asyncio.run(self._with(_whole))
        return found

    async def _with(self, work: Any) -> Any:
        store, imports = RedisStore.from_url(self.server.url), RedisImports.from_url(self.server.url)
        try:
            return await work(World(store, imports, ObstoreBlobs.from_url(self.blob_url), self.root))
        finally:
            await store.close()
            await imports.close()


async def _whole(world: World) -> AdapterSummary | None:
    """Versions are whole, aliases lead to some, counters are right, and the sweep leaves exactly what is referred to."""
    store, keys = world.store, TenantKeys(TENANT)
    for record in await world.imports.open():
        await world.imports.update(TENANT, record.id, _given_up)
    try:
        summary = await store.get(TENANT, NAME)
    except NotPublished:
        summary = None
    versions = summary.versions if summary else ()
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for version in versions:
        sizes |= version.blob_sizes
        for sha in version.blob_sha256s:
            counts[sha] = counts.get(sha, 0) + 1
        manifest = await world.blobs.get_bytes(TENANT, version.digest.removeprefix("sha256:"))
        assert manifest == canonical_manifest(version.files)
        for entry in (*version.files, *version.attachments):
            assert len(await world.blobs.get_bytes(TENANT, entry.sha256)) == entry.size
    assert {int(n) for n in (summary.aliases if summary else {}).values()} <= {v.version for v in versions}
    refs = await store._command("HGETALL", keys.refs)
    assert {sha: int(count) for sha, count in refs.items()} == counts
    kept = {sha: int(size) for sha, size in (await store._command("HGETALL", keys.sizes)).items()}
    assert kept.pop("total", 0) == sum(sizes.values())
    assert kept == sizes
    names = await store._command("SMEMBERS", keys.names)
    assert set(names) == ({NAME} if versions else set())
    for sha in await store._command("ZRANGE", keys.deleting, "0", "-1"):  # as if the dead sweeper's lease were over
        await store._command("ZADD", keys.deleting, "1", sha)
    await sweep_blobs(store, world.blobs, 0.0)
    assert {sha async for sha in world.blobs.list(TENANT)} == set(sizes)
    return summary


def _given_up(record: Any) -> Any:
    return record.changed(state="rejected", fault={"code": "given_up", "message": ""})


ACTS = (
    acts.publish, acts.move, acts.roll_back, acts.delete_version, acts.delete_all, acts.sweep, acts.import_and_give_up,
)  # fmt: skip


def prepare(registry: Registry, act: Act) -> None:
    registry.begin()
    if act is acts.delete_version:  # which `prod` must not point at
        assert registry.do(acts.move).answer == 2
    if act is acts.sweep:
        assert registry.do(acts.move).answer == 2
        assert registry.do(acts.delete_version).answer == [1]


def look(summary: AdapterSummary | None) -> str:
    """What people see of it, but for when it was made."""
    if summary is None:
        return "nothing"
    return json.dumps([[(v.version, v.digest) for v in summary.versions], summary.aliases], default=str)


def done_again(registry: Registry, act: Act, fault: Fault) -> None:
    """The act ends where it would have ended at once; what is gone already cannot go once more."""
    again = registry.do(act)
    gone = act in (acts.delete_version, acts.delete_all) and again.error.startswith("NotPublished")
    assert not again.error or gone, (fault, again)


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_a_process_dies_at_every_step(server: RedisServer, tmp_path: Path, act: Act) -> None:
    registry = Registry(server, tmp_path)
    prepare(registry, act)
    before = look(registry.check() if act is not acts.sweep else None)
    whole = registry.do(act)
    after = look(registry.check())
    assert whole.steps > 0
    assert not whole.error
    for step in range(1, whole.steps + 1):
        for when in ("before", "after"):
            prepare(registry, act)
            fault = Fault(step, when)
            assert registry.do(act, fault=fault).died, fault
            seen = look(registry.check())
            assert seen in (before, after) or act is acts.sweep, fault
            if act is not acts.roll_back:
                done_again(registry, act, fault)
                assert look(registry.check()) == after, fault


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_redis_dies_at_every_step(server: RedisServer, tmp_path: Path, act: Act) -> None:
    registry = Registry(server, tmp_path)
    prepare(registry, act)
    before = look(registry.check() if act is not acts.sweep else None)
    whole = registry.do(act)
    after = look(registry.check())
    for step in range(1, whole.steps + 1):
        for when in ("before", "after"):
            prepare(registry, act)
            fault = Fault(step, when, victim=server.pid)
            ending = registry.do(act, fault=fault)
            assert not ending.died
            server.stop(kill=True)
            server.start()
            seen = look(registry.check())
            assert seen in (before, after) or act is acts.sweep, fault
            if not ending.error:
                assert seen == after, f"acknowledged, and lost: {fault}"
            if act is not acts.roll_back:
                done_again(registry, act, fault)
                assert look(registry.check()) == after, fault
