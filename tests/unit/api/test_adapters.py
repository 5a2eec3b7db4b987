"""Publishing and managing adapters over HTTP."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_app import BASE, ApiWorld, form_files, write_adapter

from slipstream.api.uploads import prepare_upload_dir
from slipstream.testing import FAKE_BASE, FakeEngine

STRANGE_FILES = ["../evil", "a/b", "/etc/x", "..", ".hidden", "a\\b", "x" * 300, "", "nul\0", "a b", "é"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")


def left_behind(world: ApiWorld) -> list[Path]:
    return list(world.upload_dir.glob("*")) if world.upload_dir.exists() else []


async def push(http: httpx.AsyncClient, folder: Path, name: str = "sql") -> httpx.Response:
    return await http.post("/v1/adapters", data={"name": name}, files=form_files(folder))


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["message"].endswith((".", "?"))
    return error


async def test_a_published_adapter_answers(http: httpx.AsyncClient, world: ApiWorld, folder: Path) -> None:
    response = await push(http, folder)
    assert response.status_code == 201, response.text
    version = response.json()
    assert (version["ref"], version["state"], version["kind"], version["rank"]) == ("sql@1", "ready", "lora", 2)
    assert version["digest"].startswith("sha256:")
    assert left_behind(world) == []
    answer = await http.post("/v1/completions", json={"model": "sql", "prompt": "x"})
    assert answer.json()["model"] == "sql@1"
    held = {sha for _, sha in world.blobs.content}
    assert {file["sha256"] for file in version["files"]} | {version["digest"][7:]} == held


async def test_the_same_content_is_the_same_version(http: httpx.AsyncClient, folder: Path, tmp_path: Path) -> None:
    await push(http, folder)
    again = await push(http, folder)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    other = await push(http, write_adapter(tmp_path / "other", seed=1))
    assert (other.status_code, other.json()["version"]) == (201, 2)


async def test_versions_aliases_and_removal(http: httpx.AsyncClient, world: ApiWorld) -> None:
    await world.publish("sql", content="a")
    await world.publish("sql", content="b")
    url = "/v1/adapters/sql"
    adapter = (await http.get(url)).json()
    assert (adapter["current"], [v["version"] for v in adapter["versions"]]) == (2, [2, 1])
    assert (await http.put(f"{url}/aliases/prod", json={"version": 1})).status_code == 200
    assert (await http.get(url)).json()["current"] == 1
    assert (await http.get(f"{url}/versions/1")).json()["ref"] == "sql@1"
    refusal(await http.delete(f"{url}/versions/1"), 409)
    assert (await http.delete(f"{url}/aliases/prod")).status_code == 204
    assert (await http.delete(f"{url}/versions/1")).json()["versions"] == [1]
    refusal(await http.get(f"{url}/versions/1"), 404)
    assert (await http.delete(url)).json()["versions"] == [2]
    refusal(await http.get(url), 404)
    assert (await http.get("/v1/adapters")).json()["data"] == []


async def test_other_tenants_see_nothing(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await world.publish("sql")
    async with world.client(await world.key("other")) as stranger:
        for name in ("sql", "never-was"):
            answers = [
                await stranger.get(f"/v1/adapters/{name}"),
                await stranger.delete(f"/v1/adapters/{name}"),
                await stranger.get(f"/v1/adapters/{name}/versions/1"),
                await stranger.put(f"/v1/adapters/{name}/aliases/prod", json={"version": 1}),
                await stranger.get(f"/v1/models/demo/{name}"),
            ]
            texts = {refusal(answer, 404)["message"].replace(name, "N") for answer in answers}
            if name == "sql":
                first = texts
        assert texts == first
        assert (await stranger.get("/v1/adapters")).json()["data"] == []
    assert (await http.get("/v1/adapters/sql")).status_code == 200


@pytest.mark.parametrize("name", ["Upper", "", "../x", "a" * 64, "a b", "é", "x" * 300])
async def test_bad_names(http: httpx.AsyncClient, world: ApiWorld, folder: Path, name: str) -> None:
    refusal(await push(http, folder, name))
    assert left_behind(world) == []


async def test_the_bases_own_name_is_taken(http: httpx.AsyncClient, folder: Path) -> None:
    assert BASE.endswith("/base-1b")
    refusal(await push(http, folder, "base-1b"), 409)


@pytest.mark.parametrize("name", STRANGE_FILES)
async def test_file_names_are_checked(http: httpx.AsyncClient, world: ApiWorld, name: str) -> None:
    part = f'--B\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\nx\r\n--B--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=B"}
    error = refusal(await http.post("/v1/adapters", content=part.encode(), headers=headers))
    assert error["code"] in ("invalid_file_name", "invalid_multipart")
    assert left_behind(world) == []
    assert not list(world.upload_dir.parent.glob("evil"))


@pytest.mark.parametrize(
    ("data", "files"),
    [
        ({}, [("files", ("a.json", b"{}"))]),
        ({"name": "x", "other": "y"}, [("files", ("a.json", b"{}"))]),
        ({"name": ["x", "y"]}, [("files", ("a.json", b"{}"))]),
        ({"name": "x"}, [("file", ("a.json", b"{}"))]),
        ({"name": "x"}, [("files", ("a.json", b"{}")), ("files", ("a.json", b"{}"))]),
        ({"name": "x"}, [("files", (f"f{i}.json", b"{}")) for i in range(65)]),
        ({"name": "x"}, [("files", ("model.bin", b"pickle"))]),
        ({"name": "x"}, [("files", ("adapter_config.json", b"{"))]),
    ],
)
async def test_bad_forms(http: httpx.AsyncClient, world: ApiWorld, data: dict[str, Any], files: Any) -> None:
    refusal(await http.post("/v1/adapters", data=data, files=files))
    assert left_behind(world) == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=", b"x"),
        ("multipart/form-data; boundary=" + "b" * 300, b"x"),
        ("multipart/form-data; boundary=B", b""),
        ("multipart/form-data; boundary=B", b"garbage"),
        ("multipart/form-data; boundary=B", b"--B\r\n\r\nx\r\n--B--\r\n"),
        ("multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="name"\r\n\r\nsql\r\n'),
        ("multipart/form-data; boundary=B", b"--B\r\n" + b"a: b\r\n" * 50 + b"\r\nx\r\n--B--\r\n"),
        ("multipart/form-data; boundary=B", b"--B\r\na: " + b"b" * 100_000 + b"\r\n\r\nx\r\n--B--\r\n"),
        ("multipart/form-data; boundary=B", b"--B--\r\n"),
    ],
)
async def test_bodies_that_are_no_form(http: httpx.AsyncClient, world: ApiWorld, kind: str, body: bytes) -> None:
    refusal(await http.post("/v1/adapters", content=body, headers={"content-type": kind}))
    assert left_behind(world) == []


async def test_an_announced_giant_is_refused_unread(http: httpx.AsyncClient, world: ApiWorld) -> None:
    read = 0

    async def giant() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"x"

    headers = {"content-type": "multipart/form-data; boundary=B", "content-length": str(10 * 10**9)}
    refusal(await http.post("/v1/adapters", content=giant(), headers=headers), 413)
    assert left_behind(world) == []
    assert read == 0


async def test_bytes_are_counted_when_nothing_is_announced(world: ApiWorld) -> None:
    world.rebuild(max_upload_bytes=100_000)

    async def endless() -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.safetensors"\r\n\r\n'
        while True:
            yield b"x" * 10_000

    async with world.client(await world.key()) as client:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        refusal(await client.post("/v1/adapters", content=endless(), headers=headers), 413)
    assert left_behind(world) == []


async def test_large_files_arrive_whole(http: httpx.AsyncClient, world: ApiWorld, folder: Path) -> None:
    card = bytes(range(256)) * 20_000  # 5 MB, across many writes
    (folder / "curve.png").write_bytes(card)
    response = await push(http, folder)
    assert response.status_code == 201, response.text
    [attachment] = response.json()["attachments"]
    assert world.blobs.content["demo", attachment["sha256"]] == card


async def test_broken_adapters_are_refused_by_rule(http: httpx.AsyncClient, world: ApiWorld, tmp_path: Path) -> None:
    broken: dict[str, Path] = {name: tmp_path / name for name in ("truncated", "claims", "nan", "base", "shape")}
    tensors = write_adapter(broken["truncated"]) / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    (write_adapter(broken["claims"]) / "adapter_model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    write_adapter(broken["nan"], nan=True)
    write_adapter(broken["base"], base="somebody/else-7b")
    config = write_adapter(broken["shape"]) / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    codes = set()
    for name, each in broken.items():
        error = refusal(await push(http, each, name))
        codes.add(error["code"])
        refusal(await http.get(f"/v1/adapters/{name}"), 404)
    assert len(codes) >= 4
    assert world.blobs.content == {}
    assert left_behind(world) == []


async def test_a_failing_bucket_leaves_nothing_visible(http: httpx.AsyncClient, world: ApiWorld, folder: Path) -> None:
    async def full(tenant: str, sha256: str, data: bytes) -> None:
        raise OSError("no space left on /secret/disk")

    world.blobs.put_bytes = full  # type: ignore[method-assign]
    response = await push(http, folder)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert (await http.get("/v1/adapters")).json()["data"] == []
    assert left_behind(world) == []


@pytest.mark.parametrize("version", ["0", "-1", "x", "9" * 30, "1.5"])
async def test_bad_version_numbers(http: httpx.AsyncClient, world: ApiWorld, version: str) -> None:
    await world.publish("sql")
    refusal(await http.get(f"/v1/adapters/sql/versions/{version}"))
    refusal(await http.put("/v1/adapters/sql/aliases/prod", json={"version": version}))


@pytest.mark.parametrize("alias", ["3", "UP", "a" * 64])
async def test_bad_aliases(http: httpx.AsyncClient, world: ApiWorld, alias: str) -> None:
    await world.publish("sql")
    refusal(await http.put(f"/v1/adapters/sql/aliases/{alias}", json={"version": 1}))
    refusal(await http.delete(f"/v1/adapters/sql/aliases/{alias}"))


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    old, new, other = tmp_path / "upload-old", tmp_path / "upload-new", tmp_path / "kept"
    for each in (old, new, other):
        each.mkdir()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    prepare_upload_dir(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "upload-new"]


def test_the_fake_base_has_the_layer_that_the_adapters_here_change() -> None:
    assert FAKE_BASE.linears["model.layers.0.self_attn.q_proj"] == (8, 8)


async def test_an_alias_for_a_version_that_is_not_there(http: httpx.AsyncClient, world: ApiWorld) -> None:
    await world.publish("sql")
    for name, version in (("sql", 9), ("nobody", 1)):
        answer = await http.put(f"/v1/adapters/{name}/aliases/prod", json={"version": version})
        assert refusal(answer, 404)["message"] == f"There is no version {version} of '{name}'."


OTHER = replace(FAKE_BASE, id="fake/other-2b", base_digest="sha256:" + "2" * 64)


@pytest.mark.parametrize("base", ["fake/other-2b", "other-2b"])
async def test_with_several_base_models_one_is_named(world: ApiWorld, tmp_path: Path, base: str) -> None:
    other = FakeEngine(OTHER)
    world.rebuild(engines={BASE: world.engine, OTHER.id: other})
    folder = write_adapter(tmp_path / "lora", base="elsewhere/Other-2B")
    async with world.client(await world.key()) as http:
        files = form_files(folder)
        for fields in ({"name": "sql"}, {"name": "sql", "base": "third"}):
            error = refusal(await http.post("/v1/adapters", data=fields, files=files))
            assert error["param"] == "base"
            assert f"{BASE}, {OTHER.id}" in error["message"]
        wrong = await http.post("/v1/adapters", data={"name": "sql", "base": BASE}, files=files)
        assert refusal(wrong)["code"] == "base_mismatch"
        assert (await http.post("/v1/adapters", data={"name": "sql", "base": base}, files=files)).status_code == 201
        assert (await http.post("/v1/completions", json={"model": "sql", "prompt": "x"})).status_code == 200
    assert len(other.requests) == 1


@pytest.mark.parametrize("name", ["base-1b"])
async def test_a_base_models_name_is_taken(http: httpx.AsyncClient, folder: Path, name: str) -> None:
    assert "base model's own name" in refusal(await push(http, folder, name), 409)["message"]
