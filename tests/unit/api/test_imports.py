"""/v1/imports: parts in any order, what is refused on the way, and what becomes of an import when gateways die.

Over 400 lines: one life of an import, from its first part to its last gateway, set up once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_app import ADMIN_KEY, ApiWorld, form_files, write_adapter

from adapter_registry import imports as registry
from adapter_registry.errors import StoreUnavailable
from adapter_registry.imports import ImportRecord
from adapter_registry.records import utc_now
from slipstream.api.app import import_rounds
from slipstream.errors import InvalidRequest, Unavailable
from slipstream.importing.rounds import ABANDONED_S, LEASE_S, MAX_ATTEMPTS, ImportRounds
from slipstream.importing.sources import Progress, Sources

PART = 100  # bytes, so that small files have many parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PART_BYTES", PART)
    monkeypatch.setattr("slipstream.api.imports.PART_BYTES", PART)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")


def rounds_of(world: ApiWorld, **changes: Any) -> ImportRounds:
    rounds = import_rounds(world.app.state.runtime.services, world.app.state.runtime)
    for name, value in changes.items():
        setattr(rounds, name, value)
    return rounds


async def make(rounds: ImportRounds) -> None:
    """One round, to the end of what it starts."""
    await rounds.make()
    await rounds.settled()


def listed(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    ]


def parts_of(files: dict[str, bytes]) -> list[tuple[str, int, bytes]]:
    return [
        (name, i, data[i * PART : (i + 1) * PART])
        for name, data in files.items()
        for i in range(registry.part_count(len(data)))
    ]


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


async def put(http: httpx.AsyncClient, id_: str, part: tuple[str, int, bytes], **headers: str) -> httpx.Response:
    name, index, data = part
    return await http.put(f"/v1/imports/{id_}/files/{name}/parts/{index}", content=data, headers=headers)


async def begin(http: httpx.AsyncClient, files: dict[str, bytes], **more: Any) -> dict[str, Any]:
    answer = await http.post("/v1/imports", json={"name": "sql", "files": listed(files), **more})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/imports/{found['id']}"
    return found


async def send_all(http: httpx.AsyncClient, files: dict[str, bytes], **more: Any) -> str:
    begun = await begin(http, files, **more)
    for part in parts_of(files):
        assert (await put(http, begun["id"], part)).status_code == 204
    assert (await http.post(f"/v1/imports/{begun['id']}/complete")).status_code == 202
    return str(begun["id"])


async def state_of(http: httpx.AsyncClient, id_: str) -> dict[str, Any]:
    found: dict[str, Any] = (await http.get(f"/v1/imports/{id_}")).json()
    return found


async def test_parts_in_any_order_and_again(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    files, rounds = read(folder), rounds_of(world)
    begun = await begin(http, files, labels={"team": "search"}, speculation={"enabled": False, "reason": "slow"})
    assert begun["state"] == "registered"
    assert [len(file["missing_parts"]) for file in begun["files"]] == [file["parts"] for file in begun["files"]]
    *most, last = reversed(parts_of(files))
    assert len(most) > 2
    for part in [*most, most[0]]:
        digest = base64.b64encode(hashlib.sha256(part[2]).digest()).decode()
        sent = await put(http, begun["id"], part, **{"Content-Digest": f"sha-256=:{digest}:"})
        assert sent.status_code == 204, sent.text
    early = await http.post(f"/v1/imports/{begun['id']}/complete")
    assert (early.status_code, early.json()["error"]["code"]) == (400, "incomplete_upload")
    missing = (await state_of(http, begun["id"]))["files"]
    assert [file["missing_parts"] for file in missing] == [[last[1]] if f == last[0] else [] for f in files]
    assert (await put(http, begun["id"], last)).status_code == 204
    await make(rounds)  # not complete: nothing happens
    assert (await state_of(http, begun["id"]))["state"] == "registered"
    assert (await http.post(f"/v1/imports/{begun['id']}/complete")).json()["state"] == "validating"
    assert (await http.post(f"/v1/imports/{begun['id']}/complete")).status_code == 202
    assert (await http.get("/v1/adapters/sql")).status_code == 404
    assert (await put(http, begun["id"], last)).status_code == 409
    await make(rounds)
    ended = await state_of(http, begun["id"])
    assert (ended["state"], ended["version"], ended["new"], ended["error"]) == ("ready", "sql@1", True, None)
    assert (await http.post(f"/v1/imports/{begun['id']}/complete")).json()["state"] == "ready"
    [version] = (await http.get("/v1/adapters/sql")).json()["versions"]
    assert (version["labels"], version["speculation"]["enabled"]) == ({"team": "search"}, False)
    assert {entry["path"]: entry["sha256"] for entry in version["files"]} == {
        file["path"]: file["sha256"] for file in listed(files)
    }
    assert list(world.upload_dir.glob("*")) == []
    garbage = set(await world.store.begin_sweep("demo", 0))  # the parts, but for those that are files
    assert garbage
    assert not garbage & {entry["sha256"] for entry in version["files"]}
    assert await world.imports.open() == []
    await world.store.end_sweep("demo", garbage)
    again = await send_all(http, files)
    await make(rounds)
    assert (await state_of(http, again))["new"] is False


@pytest.mark.parametrize(
    ("part", "headers", "code"),
    [
        (("adapter_config.json", 9999, b"x"), {}, "no_such_part"),
        (("other.json", 0, b"x"), {}, "no_such_part"),
        (("adapter_config.json", 0, b"short"), {}, "wrong_part_size"),
        (("adapter_config.json", 0, b"x" * 101), {}, "wrong_part_size"),
        (("adapter_config.json", 0, None), {"Content-Digest": "md5=:xyz:"}, "invalid_value"),
        (("adapter_config.json", 0, None), {"Content-Digest": "sha-256=:xyz:"}, "invalid_value"),
        (
            ("adapter_config.json", 0, None),
            {"Content-Digest": f"sha-256=:{base64.b64encode(bytes(32)).decode()}:"},
            "checksum_mismatch",
        ),
    ],
)
async def test_parts_that_are_refused(
    world: ApiWorld, http: httpx.AsyncClient, folder: Path, part: Any, headers: dict[str, str], code: str
) -> None:
    files = read(folder)
    begun = await begin(http, files)
    name, index, data = part
    right = next(content for path, i, content in parts_of(files) if (path, i) == ("adapter_config.json", 0))
    answer = await put(http, begun["id"], (name, index, right if data is None else data), **headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert (await world.imports.parts("demo", begun["id"])) == {}
    assert list(world.upload_dir.glob("*")) == []


SHA = "0" * 64


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "sql"}, 400, "files"),
        ({"name": "sql", "files": [], "source": "hf://a/b"}, 400, "files"),
        ({"name": "sql", "files": [{"path": "../x", "size": 1, "sha256": SHA}]}, 400, "files.0.path"),
        ({"name": "sql", "files": [{"path": "x", "size": -1, "sha256": SHA}]}, 400, "files.0.size"),
        ({"name": "sql", "files": [{"path": "x", "size": 1, "sha256": "x"}]}, 400, "files.0.sha256"),
        ({"name": "sql", "files": [{"path": "x", "size": 1, "sha256": SHA}] * 2}, 400, "files"),
        ({"name": "sql", "files": [{"path": "x", "size": 10**13, "sha256": SHA}]}, 413, None),
        ({"name": "SQL", "files": [{"path": "x", "size": 1, "sha256": SHA}]}, 400, None),
        ({"name": "sql", "base": "other", "files": [{"path": "x", "size": 1, "sha256": SHA}]}, 400, "base"),
        ({"name": "sql", "source": "https://evil.example/x"}, 400, "source"),
        ({"name": "sql", "source": "s3://not-allowed/x"}, 400, "source"),
        ({"name": "sql", "source": "hf://no-owner"}, 400, "source"),
        ({"name": "sql", "source": "hf://a/b", "smoke": [{"prompt": ""}]}, 400, "smoke.0.prompt"),
    ],
)  # fmt: skip
async def test_imports_that_are_refused(
    world: ApiWorld, http: httpx.AsyncClient, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = await http.post("/v1/imports", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert await world.imports.open() == []


async def test_others_imports_are_unknown(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    files = read(folder)
    begun = await begin(http, files)
    async with world.client(await world.key("globex")) as other:
        assert (await other.get("/v1/imports")).json()["data"] == []
        for answer in (
            await other.get(f"/v1/imports/{begun['id']}"),
            await put(other, begun["id"], parts_of(files)[0]),
            await other.post(f"/v1/imports/{begun['id']}/complete"),
            await other.delete(f"/v1/imports/{begun['id']}"),
            await http.get("/v1/imports/imp-nothing"),
        ):
            assert answer.status_code == 404
    assert [each["id"] for each in (await http.get("/v1/imports")).json()["data"]] == [begun["id"]]


async def test_given_up_or_abandoned(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    files = read(folder)
    given_up, abandoned = [await begin(http, files) for _ in range(2)]
    for begun in (given_up, abandoned):
        await put(http, begun["id"], parts_of(files)[0])
    assert (await http.delete(f"/v1/imports/{given_up['id']}")).json()["error"]["code"] == "given_up"
    assert (await http.delete(f"/v1/imports/{given_up['id']}")).status_code == 409
    later = utc_now() + timedelta(seconds=ABANDONED_S + 1)
    await make(rounds_of(world, now=lambda: later))
    assert (await state_of(http, abandoned["id"]))["error"]["code"] == "upload_abandoned"
    assert await world.store.begin_sweep("demo", 0) == [hashlib.sha256(parts_of(files)[0][2]).hexdigest()]


async def test_why_one_was_rejected(world: ApiWorld, http: httpx.AsyncClient, tmp_path: Path) -> None:
    rounds = rounds_of(world)
    broken = await send_all(http, read(write_adapter(tmp_path / "nan", nan=True)))
    await make(rounds)
    found = await state_of(http, broken)
    assert (found["state"], found["error"]["code"]) == ("rejected", "non_finite")
    assert found["error"]["param"] == "adapter_model.safetensors"
    files = read(write_adapter(tmp_path / "lora"))
    begun = await begin(http, files)
    for name, index, data in parts_of(files):
        await put(http, begun["id"], (name, index, data[:-1] + b"~" if index == 0 else data))
    await http.post(f"/v1/imports/{begun['id']}/complete")
    await make(rounds)
    assert (await state_of(http, begun["id"]))["error"]["code"] == "checksum_mismatch"
    assert (await http.get("/v1/adapters")).json()["data"] == []


async def test_a_full_tenant(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    files = read(folder)
    async with world.client(ADMIN_KEY) as admin:
        await admin.put("/v1/tenants/demo", json={"quota": {"storage_bytes": sum(map(len, files.values())) + 10}})
    id_ = await send_all(http, files)
    await make(rounds_of(world))  # the manifest is too much
    assert (await state_of(http, id_))["error"]["code"] == "storage_quota_exceeded"
    more = files | {"README.md": b"x" * 1000}
    refused = await http.post("/v1/imports", json={"name": "sql", "files": listed(more)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "storage_quota_exceeded")
    form = await http.post("/v1/adapters", data={"name": "sql"}, files=form_files(folder))
    assert (form.status_code, form.json()["error"]["code"]) == (403, "storage_quota_exceeded")


async def test_an_archive_in_parts_and_in_a_form(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in read(folder).items():
            archive.writestr(f"my-lora/{name}", data)
    form = await http.post("/v1/adapters", data={"name": "sql"}, files=[("files", ("lora.zip", out.getvalue()))])
    assert form.status_code == 201, form.text
    assert sorted(entry["path"] for entry in form.json()["files"]) == sorted(read(folder))
    id_ = await send_all(http, {"lora.zip": out.getvalue()})
    await make(rounds_of(world))
    assert (await state_of(http, id_))["version"] == "sql@1"
    broken = await http.post("/v1/adapters", data={"name": "sql"}, files=[("files", ("lora.zip", b"PK"))])
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "bad_archive")


async def test_smoke_prompts(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    rounds = rounds_of(world)
    right = [{"prompt": "two plus two", "expect": "four"}, {"prompt": "anything"}]
    wrong = [{"prompt": "two plus two", "expect": "five"}]
    world.engine.enqueue("it is four", "it is four")
    id_ = await send_all(http, read(folder), smoke=wrong)
    await make(rounds)
    fault = (await state_of(http, id_))["error"]
    assert (fault["code"], fault["param"]) == ("smoke_test", "smoke.0.expect")
    assert "four" in fault["message"]
    form = {"name": "sql", "smoke": json.dumps(wrong)}
    refused = await http.post("/v1/adapters", data=form, files=form_files(folder))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "smoke_test")
    assert (await http.get("/v1/adapters")).json()["data"] == []
    world.engine.enqueue("it is four")
    id_ = await send_all(http, read(folder), smoke=right)
    await make(rounds)
    assert (await state_of(http, id_))["version"] == "sql@1"
    assert world.engine.requests[-1].adapter is not None
    for bad in ("[", '[{"prompt": 1}]', '[{"prompt": "x", "max_tokens": 1000}]'):
        answer = await http.post("/v1/adapters", data={"name": "sql", "smoke": bad}, files=form_files(folder))
        assert (answer.status_code, answer.json()["error"]["param"].partition(".")[0]) == (400, "smoke")


@dataclass
class ScriptedSources(Sources):
    """Gives a folder's files, after what it was told to raise."""

    folder: Path
    raises: list[Exception] = field(default_factory=list)
    fetched: int = 0
    hold: asyncio.Event | None = None

    def check(self, url: str) -> None:
        """All are allowed."""

    async def fetch(self, url: str, folder: Path, max_bytes: int, progress: Progress) -> str:
        """Copy."""
        self.fetched += 1
        progress(10)
        if self.hold is not None:
            await self.hold.wait()
        if self.raises:
            raise self.raises.pop(0)
        for name, data in read(self.folder).items():
            (folder / name).write_bytes(data)
        return f"{url}@exact"


async def pull(http: httpx.AsyncClient) -> str:
    answer = await http.post("/v1/imports", json={"name": "sql", "source": "hf://owner/name"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def test_a_pull_says_where_it_came_from(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    id_ = await pull(http)
    await make(rounds_of(world, sources=ScriptedSources(folder)))
    assert (await state_of(http, id_))["version"] == "sql@1"
    [version] = (await http.get("/v1/adapters/sql")).json()["versions"]
    assert version["lineage"]["source"] == "hf://owner/name@exact"


async def test_a_pull_is_tried_again_and_then_given_up(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    sources = ScriptedSources(folder, raises=[Unavailable("away")])
    now = utc_now()
    rounds = rounds_of(world, now=lambda: now, sources=sources)
    id_ = await pull(http)
    await make(rounds)
    await make(rounds)  # it rests
    assert sources.fetched == 1
    now += timedelta(seconds=LEASE_S + 1)
    await make(rounds)
    assert (await state_of(http, id_))["state"] == "ready"
    sources.raises = [Unavailable("away")] * MAX_ATTEMPTS
    id_ = await pull(http)
    for _ in range(MAX_ATTEMPTS):
        await make(rounds)
        now += timedelta(seconds=LEASE_S + 1)
    found = await state_of(http, id_)
    assert (found["state"], found["error"]["code"]) == ("rejected", "unavailable")
    sources.raises = [InvalidRequest("gone", code="source_not_found", param="source")]
    id_ = await pull(http)
    await make(rounds)
    assert (await state_of(http, id_))["error"]["code"] == "source_not_found"


async def test_another_gateway_goes_on_when_one_dies(world: ApiWorld, http: httpx.AsyncClient, folder: Path) -> None:
    sources = ScriptedSources(folder, hold=asyncio.Event())
    now = utc_now()
    dying, other = (rounds_of(world, now=lambda: now, sources=sources) for _ in range(2))
    id_ = await pull(http)
    await dying.make()
    await asyncio.sleep(0)
    await make(other)
    assert sources.fetched <= 1, "its lease holds"
    await dying.close()
    sources.hold = None
    now += timedelta(seconds=LEASE_S + 1)
    await make(other)
    assert (await state_of(http, id_))["version"] == "sql@1"


async def test_who_comes_back_after_its_lease_changes_nothing(
    world: ApiWorld, http: httpx.AsyncClient, folder: Path
) -> None:
    held = ScriptedSources(folder, hold=asyncio.Event(), raises=[InvalidRequest("late", param="source")])
    now = utc_now()
    slow = rounds_of(world, now=lambda: now, sources=held)
    id_ = await pull(http)
    await slow.make()
    await asyncio.sleep(0.01)
    quick = rounds_of(world, now=lambda: now + timedelta(seconds=LEASE_S + 1), sources=ScriptedSources(folder))
    await make(quick)
    assert (await state_of(http, id_))["state"] == "ready"
    assert held.hold is not None
    held.hold.set()
    await slow.settled()
    assert (await state_of(http, id_))["state"] == "ready"


async def test_the_registry_goes_away_while_one_is_worked_on(
    world: ApiWorld, http: httpx.AsyncClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = utc_now()
    rounds = rounds_of(world, now=lambda: now)
    id_ = await send_all(http, read(folder))

    async def away(*_: object) -> Any:
        raise StoreUnavailable("away")

    monkeypatch.setattr(world.store, "publish", away)
    await make(rounds)
    monkeypatch.undo()
    monkeypatch.setattr(registry, "PART_BYTES", PART)
    record: ImportRecord = await world.imports.get("demo", id_)
    assert not record.has_ended
    now += timedelta(seconds=LEASE_S + 1)
    await make(rounds)
    assert (await state_of(http, id_))["version"] == "sql@1"
