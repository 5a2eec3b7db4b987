"""kill -9 at every step of a backup and of a restore: half a backup is none, and a restore can be begun again."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crashing import Ending, Fault, World, perform
from support.redis_server import RedisServer, running_redis
from support.registries import fill, registry_at

from adapter_registry.backup.place import BackupPlace
from adapter_registry.backup.reading import Restore, find_problems, verify
from adapter_registry.backup.records import Item
from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.backup.writing import back_up
from adapter_registry.errors import StoreUnavailable

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]


async def save(world: World) -> object:
    """Back up, one thing after the other, so that steps can be counted."""
    place = BackupPlace.from_url(str(world.folder / "backups"), make=True)
    return (await back_up(RegistryData(world.store._client), world.blobs, place, at_once=1)).id


async def bring_back(world: World) -> object:
    """Restore, likewise."""
    place = BackupPlace.from_url(str(world.folder / "backups"))
    return (await Restore(RegistryData(world.store._client), world.blobs, place, at_once=1).run()).id


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running_redis() as found:
        yield found


class Site:
    """A registry, and a place for its backups."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self.server, self.folder = server, folder

    def do(self, act: object, fault: Fault | None = None) -> Ending:
        blobs = (self.folder / "registry-blobs").as_uri()
        return perform(act, self.server.url, blobs, self.folder, fault)  # type: ignore[arg-type]

    def fill(self) -> dict[str, Item]:
        """With a version, an alias and more; returns what is there."""

        async def work() -> dict[str, Item]:
            async with registry_at(self.server.url, self.folder) as registry:
                await registry.publish("acme", "sql", "one")
                await registry.store.set_alias("acme", "sql", "prod", 1)
                return await registry.all_items()

        return asyncio.run(work())

    def look(self) -> tuple[dict[str, Item], list[str]]:
        """What is there now, and what is wrong with it."""

        async def work() -> tuple[dict[str, Item], list[str]]:
            async with registry_at(self.server.url, self.folder) as registry:
                return await registry.all_items(), await find_problems(registry.data, registry.blobs)

        return asyncio.run(work())

    def is_closed(self) -> bool:
        """Whether gateways that start now are refused."""

        async def work() -> bool:
            async with registry_at(self.server.url, self.folder) as registry:
                try:
                    await registry.store.list("acme")
                except StoreUnavailable:
                    return True
                return False

        return asyncio.run(work())

    def wipe(self) -> None:
        self.server.call("FLUSHALL")
        shutil.rmtree(self.folder / "registry-blobs", ignore_errors=True)

    def backups(self) -> list[str]:
        """Whole ones, each of which is verified."""

        async def work() -> list[str]:
            place = BackupPlace.from_url(str(self.folder / "backups"), make=True)
            found = list(await place.ids())
            for id_ in found:
                await verify(place, id_)
            return found

        return asyncio.run(work())


def test_a_backup_dies_at_every_step(server: RedisServer, tmp_path: Path) -> None:
    site = Site(server, tmp_path)
    site.wipe()
    before = site.fill()
    steps = site.do(save).steps
    assert steps > 10
    for step in range(1, steps + 1):
        shutil.rmtree(tmp_path / "backups")
        assert site.do(save, Fault(step, "before")).died
        assert site.backups() == [], step
    ending = site.do(save)
    assert site.backups() == [ending.answer]
    assert site.look() == (before, [])


def test_a_restore_dies_at_every_step(server: RedisServer, tmp_path: Path) -> None:
    site = Site(server, tmp_path)
    site.wipe()
    before = site.fill()
    site.do(save)
    site.wipe()
    steps = site.do(bring_back).steps
    assert steps > 20
    seen = set()
    for step in range(1, steps + 1):
        site.wipe()
        assert site.do(bring_back, Fault(step, "before")).died
        touched = server.call("DBSIZE") > 0
        seen.add(touched)
        assert site.is_closed() == touched, step  # empty, or closed
        ending = site.do(bring_back)
        assert not ending.error, step
        assert site.look() == (before, []), step
    assert seen == {False, True}


def test_redis_dies_in_the_middle_of_a_restore(server: RedisServer, tmp_path: Path) -> None:
    site = Site(server, tmp_path)
    site.wipe()

    async def much() -> dict[str, Item]:
        async with registry_at(server.url, tmp_path) as registry:
            await fill(registry, 5)
            return await registry.all_items()

    before = asyncio.run(much())
    site.do(save)
    site.wipe()
    steps = site.do(bring_back).steps
    for step in range(steps // 2, steps, steps // 8):
        site.wipe()
        ending = site.do(bring_back, Fault(step, "before", victim=server.pid))
        assert ending.error.startswith("StoreUnavailable"), ending
        server.stop(kill=True)
        server.start()
        assert site.is_closed()
        assert not site.do(bring_back).error
        assert site.look() == (before, [])
