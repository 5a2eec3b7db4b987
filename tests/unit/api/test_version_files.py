"""A version's files over HTTP: what was published comes back, with its attachments, and nothing else does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_app import ApiWorld, form_files, write_adapter

URL = "/v1/adapters/sql/versions/1/files"
# What `slipstream train` writes beside the weights.
ATTACHMENTS = {
    "training_card.md": ("# Card ✓\n".encode(), "text/markdown; charset=utf-8"),
    "learning_curve.png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4000, "image/png"),
    "training_log.jsonl": (b'{"step": 1}\n', "application/jsonl"),
    "metrics.json": (b"{}", "application/json"),
    "empty.txt": (b"", "text/plain; charset=utf-8"),
    "LICENSE": (b"<script>alert(1)</script>", "application/octet-stream"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_adapter(tmp_path / "lora")
    for name, (content, _) in ATTACHMENTS.items():
        (made / name).write_bytes(content)
    return made


async def publish(http: httpx.AsyncClient, folder: Path) -> dict[str, Any]:
    response = await http.post("/v1/adapters", data={"name": "sql"}, files=form_files(folder))
    assert response.status_code == 201, response.text
    version: dict[str, Any] = response.json()
    return version


async def test_every_file_is_listed_and_comes_back(http: httpx.AsyncClient, world: ApiWorld, folder: Path) -> None:
    version = await publish(http, folder)
    listed = (await http.get(URL)).json()
    assert listed["object"] == "list"
    assert {row["path"]: row["attachment"] for row in listed["data"]} == {
        "adapter_config.json": False,
        "adapter_model.safetensors": False,
        **dict.fromkeys(ATTACHMENTS, True),
    }
    assert {row["path"] for row in version["attachments"]} == set(ATTACHMENTS)
    for row in listed["data"]:
        content = (folder / row["path"]).read_bytes()
        assert (row["size"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        answer = await http.get(f"{URL}/{row['path']}")
        assert answer.status_code == 200
        assert answer.content == content
        assert answer.headers["content-length"] == str(len(content))
        assert answer.headers["content-disposition"] == f"attachment; filename*=utf-8''{row['path']}"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert list(world.upload_dir.iterdir()) == []


@pytest.mark.parametrize("name", sorted(ATTACHMENTS))
async def test_content_types(http: httpx.AsyncClient, folder: Path, name: str) -> None:
    await publish(http, folder)
    assert (await http.get(f"{URL}/{name}")).headers["content-type"] == ATTACHMENTS[name][1]
    assert (await http.get(f"{URL}/adapter_model.safetensors")).headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "path", ["nothing.md", "Training_card.md", "%2E%2E", "..%2F..%2Fetc%2Fpasswd", "a%00b", "é", "x" * 300]
)
async def test_unknown_files(http: httpx.AsyncClient, folder: Path, path: str) -> None:
    await publish(http, folder)
    assert (await http.get(f"{URL}/{path}")).status_code == 404


async def test_unknown_versions_and_other_tenants(http: httpx.AsyncClient, world: ApiWorld, folder: Path) -> None:
    await publish(http, folder)
    for url in ("/v1/adapters/sql/versions/2/files", "/v1/adapters/other/versions/1/files"):
        assert (await http.get(url)).status_code == 404
        assert (await http.get(f"{url}/training_card.md")).status_code == 404
    async with world.client(await world.key("other")) as stranger:
        for url in (URL, f"{URL}/training_card.md"):
            missing = await stranger.get(url.replace("sql", "nil"))
            theirs = await stranger.get(url)
            assert theirs.status_code == 404
            assert theirs.json()["error"]["message"].replace("sql", "nil") == missing.json()["error"]["message"]
    async with world.client(None) as nobody:
        assert (await nobody.get(f"{URL}/training_card.md")).status_code == 401


@pytest.mark.parametrize("damage", ["lost", "changed"])
async def test_damaged_content_is_never_sent(
    http: httpx.AsyncClient, world: ApiWorld, folder: Path, damage: str
) -> None:
    version = await publish(http, folder)
    key = ("demo", next(row["sha256"] for row in version["attachments"] if row["path"] == "metrics.json"))
    if damage == "lost":
        del world.blobs.content[key]
    else:
        world.blobs.content[key] = b"[]"
    answer = await http.get(f"{URL}/metrics.json")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert list(world.upload_dir.iterdir()) == []


async def test_the_first_attachments_of_a_content_stay(http: httpx.AsyncClient, folder: Path) -> None:
    """Identical weights are the existing version, whatever lies beside them."""
    await publish(http, folder)
    (folder / "training_card.md").write_text("another card")
    again = await http.post("/v1/adapters", data={"name": "sql"}, files=form_files(folder))
    assert again.status_code == 200
    assert (await http.get(f"{URL}/training_card.md")).content == ATTACHMENTS["training_card.md"][0]
