"""`fetch_files`: what arrives is the version, whole and checked, or an error and no file under its name."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from support.api_app import ApiWorld, write_adapter

from adapter_registry.records import SpeculationPolicy
from slipstream import errors as tree
from slipstream.client import SlipstreamClient

CARD = b"# Card\n" * 50_000


@pytest.fixture
def world(tmp_path: Path) -> ApiWorld:
    return ApiWorld(tmp_path / "uploads")


@pytest_asyncio.fixture
async def client(world: ApiWorld, tmp_path: Path) -> AsyncIterator[SlipstreamClient]:
    """With `sql@1` (a card beside it) and `sql@2` published, alias `prod` on the first."""
    transport = httpx.ASGITransport(world.app)
    async with SlipstreamClient("http://test", await world.key(), transport=transport) as client:
        first = write_adapter(tmp_path / "first")
        (first / "training_card.md").write_bytes(CARD)
        await client.push(first, "sql")
        await client.push(write_adapter(tmp_path / "second", seed=1), "sql")
        await client.set_alias("sql", "stable", 1)
        yield client


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("reference", "published"),
    [("sql", "second"), ("sql@1", "first"), ("sql/1", "first"), ("sql@stable", "first"), ("demo/sql@1", "first")],
)
async def test_a_version_comes_back_whole(
    client: SlipstreamClient, tmp_path: Path, reference: str, published: str
) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "new" / "target"
    version = await client.fetch_files(reference, target, lambda received, total: seen.append((received, total)))
    assert contents(target) == contents(tmp_path / published)
    assert version["name"] == "sql"
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == sum(map(len, contents(target).values()))


async def test_a_digest_names_a_version_too(client: SlipstreamClient, tmp_path: Path) -> None:
    digest = (await client.get_adapter("sql"))["versions"][1]["digest"]
    assert (await client.fetch_files(f"sql@{digest}", tmp_path / "target"))["ref"] == "sql@1"


@pytest.mark.parametrize("reference", ["sql@9", "sql@nope", f"sql@sha256:{'0' * 64}", "other", "globex/sql"])
async def test_unknown_versions(client: SlipstreamClient, tmp_path: Path, reference: str) -> None:
    with pytest.raises(tree.NotFound):
        await client.fetch_files(reference, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("reference", ["", "Bad", "sql@", "../x@1"])
async def test_bad_references(client: SlipstreamClient, tmp_path: Path, reference: str) -> None:
    with pytest.raises(tree.InvalidRequest):
        await client.fetch_files(reference, tmp_path / "target")


async def test_what_is_there_and_right_is_not_fetched_again(
    client: SlipstreamClient, world: ApiWorld, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    await client.fetch_files("sql@1", target)
    (target / "adapter_config.json").unlink()
    world.blobs.content.pop(("demo", hashlib.sha256(CARD).hexdigest()))  # asking for it would fail
    await client.fetch_files("sql@1", target)
    assert contents(target) == contents(tmp_path / "first")


@pytest.mark.parametrize("name", ["notes.md", "adapter_config.json", "training_card.md"])
async def test_other_files_are_never_overwritten(client: SlipstreamClient, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / ".hidden").write_text("of a file manager")
    (target / name).write_text("mine")
    with pytest.raises(tree.InvalidRequest, match=name):
        await client.fetch_files("sql@1", target)
    assert contents(target) == {name: b"mine", ".hidden": b"of a file manager"}


async def test_a_file_is_no_folder(client: SlipstreamClient, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("x")
    with pytest.raises(tree.InvalidRequest, match="cannot be made"):
        await client.fetch_files("sql@1", tmp_path / "target")


def serving(row: dict[str, Any], body: bytes, status: int = 200) -> SlipstreamClient:
    """A client of a server with one version of one file, whatever that server says about it."""
    version = {"version": 1, "ref": "sql@1", "digest": "d", "files": [row], "attachments": []}
    adapter = {"name": "sql", "tenant": "demo", "current": 1, "aliases": {}, "versions": [version]}

    def answer(request: httpx.Request) -> httpx.Response:
        if "/files/" in request.url.path:
            return httpx.Response(status, content=body)
        return httpx.Response(200, json=adapter)

    return SlipstreamClient("http://test", "key", transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("body", [b"hell", b"hello!", b"jello", b"", b"x" * 1_000_000])
async def test_damaged_downloads_leave_nothing(tmp_path: Path, body: bytes) -> None:
    row = {"path": "a.md", "size": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}
    await serving(row, b"hello").fetch_files("sql", tmp_path / "good")
    assert contents(tmp_path / "good") == {"a.md": b"hello"}
    with pytest.raises(tree.Unavailable, match=r"a\.md"):
        await serving(row, body).fetch_files("sql", tmp_path / "target")
    assert contents(tmp_path / "target") == {}


@pytest.mark.parametrize("path", ["../evil.md", "/etc/evil", "a/b", "..", ".bashrc", "", 5])
async def test_a_server_cannot_write_outside_the_folder(tmp_path: Path, path: Any) -> None:
    row = {"path": path, "size": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}
    with pytest.raises(tree.Unavailable, match="list of files"):
        await serving(row, b"hello").fetch_files("sql", tmp_path / "in" / "target")
    assert contents(tmp_path) == {}


async def test_an_error_in_the_middle_is_the_servers_own(tmp_path: Path) -> None:
    row = {"path": "a.md", "size": 5, "sha256": "0" * 64}
    with pytest.raises(tree.NotFound):
        await serving(row, b'{"error": {"message": "Gone."}}', 404).fetch_files("sql", tmp_path / "target")


async def test_policies_through_the_client(client: SlipstreamClient, tmp_path: Path) -> None:
    off = SpeculationPolicy(enabled=False, reason="too slow")
    pushed, is_new = await client.push(write_adapter(tmp_path / "third", seed=2), "sql", speculation=off)
    assert is_new
    assert pushed["speculation"] == {"enabled": False, "reason": "too slow"}
    changed = await client.set_speculation("sql", 3, enabled=True)
    assert changed["speculation"] == {"enabled": True, "reason": ""}
    with pytest.raises(tree.NotFound):
        await client.set_speculation("sql", 9, enabled=False)
    with pytest.raises(tree.InvalidRequest):
        await client.set_speculation("sql", 3, enabled=False, reason="x" * 501)
