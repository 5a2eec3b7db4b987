"""Where backups lie, what is refused, and the command that people type."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.drafts import sha
from support.registries import Registry, bring_back, registry_at, save
from typer.testing import CliRunner

import deployments.main  # noqa: F401 - adds its commands
from adapter_registry.backup.place import BackupPlace
from adapter_registry.backup.reading import find_problems, verify
from adapter_registry.backup.records import FORMAT
from adapter_registry.backup.writing import prune
from adapter_registry.errors import (
    BackupIncomplete,
    BackupInvalid,
    RegistryNotEmpty,
    StoreUnavailable,
)
from adapter_registry.migrations import SCHEMA
from adapter_registry.records import Access
from adapter_registry.redis_connection import RESTORING
from slipstream.cli import app

pytestmark = [pytest.mark.redis]
ONE_SERVER = pytest.mark.parametrize("store_url", ["redis-tcp"], indirect=True)
EVERYWHERE = pytest.mark.parametrize("store_url", ["redis-tcp", "cluster"], indirect=True)


@ONE_SERVER
async def test_old_backups_go_with_the_blobs_that_only_they_name(registry: Registry, place: BackupPlace) -> None:
    await registry.publish("acme", "sql", "one")
    first = await save(registry, place)
    await registry.publish("acme", "sql", "two")
    await registry.store.delete("acme", "sql", 1)
    await place.put_records("20260101T000000.000000Z", "acme", b"broken off")
    second = await save(registry, place)
    going, removed = await prune(place, 1)
    assert list(going) == [first.id, "20260101T000000.000000Z"]
    assert removed == 3  # weights, card and manifest of the first; the config is in both
    assert await place.ids() == [second.id]
    assert await place.unfinished() == []
    assert await verify(place) == second


@ONE_SERVER
async def test_nothing_is_removed_when_it_is_not_known_what_the_rest_names(
    registry: Registry, place: BackupPlace, tmp_path: Path
) -> None:
    await registry.publish("acme", "sql", "one")
    first = await save(registry, place)
    second = await save(registry, place)
    (tmp_path / f"backups/backups/{second.id}/acme.jsonl").write_text("{")
    with pytest.raises(BackupInvalid, match="not as they were written"):
        await prune(place, 1)
    assert await place.ids() == [first.id, second.id]
    assert await verify(place, first.id) == first


@ONE_SERVER
@pytest.mark.parametrize("harm", ["missing", "damaged"])
async def test_without_all_blobs_there_is_no_backup(
    registry: Registry, place: BackupPlace, tmp_path: Path, harm: str
) -> None:
    await registry.publish("acme", "sql", "one")
    lost = sha("one")
    path = tmp_path / "registry-blobs/acme/blobs" / lost[:2] / lost
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(b"eno")
    with pytest.raises(BackupIncomplete, match=rf"tenant acme .*sql@1 \({harm}\)"):
        await save(registry, place)
    assert await place.ids() == []
    with pytest.raises(BackupInvalid, match="no whole backup"):
        await bring_back(registry, place)
    if harm == "missing":
        [problem] = await find_problems(registry.data, registry.blobs)
        assert f"sql@1 names blob {lost}" in problem
        again = await registry.publish(
            "acme", "sql", "one"
        )  # the runbook's first remedy: the same files, the same version
        assert again.version == 1
        assert (await save(registry, place)).tenants[0].versions == 1


@ONE_SERVER
async def test_a_registry_with_something_in_it_is_not_filled(registry: Registry, place: BackupPlace) -> None:
    await registry.publish("acme", "sql", "one")
    await save(registry, place)
    await registry.publish("globex", "chat", "two")
    before = await registry.all_items()
    with pytest.raises(RegistryNotEmpty, match=r"of 2 tenants \(acme, globex\)"):
        await bring_back(registry, place)
    assert await registry.all_items() == before
    await bring_back(registry, place, replace=True)
    assert await registry.store.tenants() == ["acme"]


def damage(folder: Path, file: str, change: Any) -> None:
    [path] = folder.rglob(file)
    path.write_bytes(change(path.read_bytes()))


def changed_manifest(**fields: Any) -> Any:
    return lambda text: json.dumps({**json.loads(text), **fields}).encode()


@ONE_SERVER
@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("manifest.json", lambda _: b"{", "manifest.json is damaged"),
        ("manifest.json", changed_manifest(format=FORMAT + 1), f"format {FORMAT + 1} .* newer"),
        ("manifest.json", changed_manifest(schema_version=SCHEMA + 1), f"schema {SCHEMA + 1} .* newer"),
        ("acme.jsonl", lambda text: text.replace(b"acme", b"axme"), "records of acme are not as they were written"),
        (sha("one"), lambda _: b"eno", r"blob .* \(sql@1\) is missing or damaged"),
    ],
    ids=["manifest", "format", "schema", "records", "blob"],
)
async def test_what_is_damaged_or_too_new_is_refused_before_anything_is_touched(
    registry: Registry, place: BackupPlace, tmp_path: Path, file: str, change: Any, said: str
) -> None:
    await registry.publish("acme", "sql", "one")
    await save(registry, place)
    await registry.publish("acme", "sql", "two")
    damage(tmp_path / "backups", file, change)
    before = await registry.all_items()
    (tmp_path / "registry-blobs/acme/blobs" / sha("one")[:2] / sha("one")).unlink()
    with pytest.raises(BackupInvalid, match=said):
        await bring_back(registry, place, replace=True)
    assert await registry.all_items() == before


@ONE_SERVER
async def test_one_tenants_records_cannot_hold_anothers(registry: Registry, place: BackupPlace, tmp_path: Path) -> None:
    await registry.publish("acme", "sql", "one")
    await registry.publish("globex", "sql", "two")
    manifest = await save(registry, place)
    records = await place.records(manifest.id, "globex")
    await place.put_records(manifest.id, "acme", records)
    stolen = manifest.tenants[1].model_dump() | {"tenant": "acme"}
    damage(tmp_path / "backups", "manifest.json", changed_manifest(tenants=[stolen]))
    await registry.wipe()
    with pytest.raises(BackupInvalid, match="not acme's"):
        await bring_back(registry, place)


@ONE_SERVER
async def test_blobs_that_are_there_are_read_or_trusted(registry: Registry, place: BackupPlace, tmp_path: Path) -> None:
    await registry.publish("acme", "sql", "one")
    await save(registry, place)
    path = tmp_path / "registry-blobs/acme/blobs" / sha("one")[:2] / sha("one")
    path.write_bytes(b"eno")
    await bring_back(registry, place, replace=True, trust_blobs=True)
    assert path.read_bytes() == b"eno"
    await bring_back(registry, place, replace=True)
    assert path.read_bytes() == b"one"


@ONE_SERVER
async def test_an_older_schema_is_kept_by_a_backup_and_brought_up_after_a_restore(
    registry: Registry, place: BackupPlace
) -> None:
    await registry.publish("acme", "sql", "one")
    stored = await registry.store.stored_bytes("acme")
    await registry.data.set_schema("1")
    assert (await save(registry, place)).schema_version == 1
    assert await registry.data.schema() == "1"
    await registry.wipe()
    await bring_back(registry, place)
    assert await registry.data.schema() == "1"
    async with registry_at(registry.url, registry.folder) as again:
        assert await again.store.stored_bytes("acme") == stored
    assert await registry.data.schema() == str(SCHEMA)


@ONE_SERVER
async def test_what_this_version_does_not_know_is_not_backed_up_by_it(registry: Registry, place: BackupPlace) -> None:
    await registry.publish("acme", "sql", "one")
    await registry.data.set_schema(str(SCHEMA + 1))
    with pytest.raises(BackupIncomplete, match="version that serves it"):
        await save(registry, place)
    await registry.data.set_schema(str(SCHEMA))
    await registry.data._command("SET", "slipstream:{acme}:novelty", "x")
    with pytest.raises(BackupIncomplete, match=r"slipstream:\{acme\}:novelty"):
        await save(registry, place)


@ONE_SERVER
async def test_nobody_uses_a_registry_that_is_half_restored(registry: Registry, place: BackupPlace) -> None:
    await registry.publish("acme", "sql", "one")
    await save(registry, place)
    await registry.data.set_schema(RESTORING)
    async with registry_at(registry.url, registry.folder) as late:
        with pytest.raises(StoreUnavailable, match="being restored"):
            await late.store.list("acme")
    with pytest.raises(BackupIncomplete, match="middle of a restore"):
        await save(registry, place)
    await bring_back(registry, place)  # it goes on without being told to replace anything
    assert await registry.data.schema() == str(SCHEMA)


@pytest.mark.parametrize("url", ["ftp://host/x", "file://host/x", "/none/such"])
def test_what_is_no_place_is_refused(url: str) -> None:
    with pytest.raises(BackupInvalid):
        BackupPlace.from_url(url)


class Shell:
    """The command, as an operator runs it."""

    def __init__(self, registry: Registry) -> None:
        self.environment = {
            "SLIPSTREAM_REDIS_URL": registry.url,
            "SLIPSTREAM_BLOB_URL": (registry.folder / "registry-blobs").as_uri(),
            "SLIPSTREAM_HOME": str(registry.folder / "home"),
        }

    async def __call__(self, *words: str, code: int = 0, **more: str) -> str:
        """What it printed; in a thread, for it has an event loop of its own."""
        mask = os.umask(0o022)
        try:
            environment = {**self.environment, **more}
            done = await asyncio.to_thread(CliRunner().invoke, app, ["registry", *words], env=environment)
        finally:
            os.umask(mask)
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return done.output


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


@ONE_SERVER
async def test_the_command(registry: Registry, tmp_path: Path) -> None:
    shell, place = Shell(registry), str(tmp_path / "place")
    await registry.publish("acme", "sql", "one")
    await registry.store.set_access("acme", "sql", Access(public=True))
    before = await registry.all_items()
    assert "There is no folder" in await shell("list", place, code=1)
    assert "agree" in await shell("check")
    assert "1 tenants, 1 adapters, 1 versions, 4 files" in await shell("backup", place)
    assert modes(Path(place)) == {0o600}
    assert "Removed 1 older backups" in await shell("backup", place, "--keep", "1")
    [listed] = json.loads(await shell("list", place, "--json"))
    assert (listed["tenants"], listed["versions"]) == (1, 1)
    assert listed["id"] in await shell("verify", place)
    assert "not empty" in await shell("restore", place, code=1)
    await registry.wipe()
    assert "There is no backup '2026'" in await shell("restore", place, "--id", "2026", code=1)
    assert "Restored" in await shell("restore", place, "--id", listed["id"])
    assert await registry.all_items() == before
    await registry.data._command("HSET", "slipstream:{acme}:refs", sha("one"), "7")
    assert "has 7 references" in await shell("check", code=1)
    assert "cannot be reached" in await shell("check", code=3, SLIPSTREAM_REDIS_URL="redis://127.0.0.1:1/0")
    assert "no registry in" in await shell("check", code=3, SLIPSTREAM_REDIS_URL="")
    shutil.rmtree(Path(place) / "blobs")
    assert "missing or damaged" in await shell("verify", place, code=1)
