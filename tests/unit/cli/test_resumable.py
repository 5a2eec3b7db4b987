"""Pushing in parts and by URL, against the application on a real port: rounds run, connections break."""

from __future__ import annotations

import asyncio
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.api_app import ApiWorld, write_adapter
from support.http_server import serving_app
from typer.testing import CliRunner, Result

from adapter_registry import imports as registry
from slipstream.cli import app
from slipstream.client import SlipstreamClient, resumable
from slipstream.errors import AdapterRejected, Unavailable

PART = 30


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PART_BYTES", PART)
    monkeypatch.setattr("slipstream.api.imports.PART_BYTES", PART)
    monkeypatch.setattr(resumable, "WORTH_RESUMING", 1)
    monkeypatch.setattr(resumable, "_PAUSE_S", 0.01)
    monkeypatch.setattr(resumable, "_POLL_S", 0.02)


@pytest.fixture
def world(tmp_path: Path) -> ApiWorld:
    world = ApiWorld(tmp_path / "uploads")
    world.rebuild(imports_every_s=0.02)
    return world


@pytest.fixture
def url(world: ApiWorld) -> Iterator[str]:
    with serving_app(world.app) as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")


def shell(url: str, key: str, *arguments: str) -> Result:
    environment = {"SLIPSTREAM_URL": url, "SLIPSTREAM_API_KEY": key, "NO_COLOR": "1", "COLUMNS": "200"}
    return CliRunner().invoke(app, list(arguments), env=environment)


def test_a_large_folder_and_an_archive(world: ApiWorld, url: str, folder: Path, tmp_path: Path) -> None:
    key = asyncio.run(world.key())
    done = shell(url, key, "adapters", "push", str(folder), "--name", "sql", "--label", "team=search")
    assert done.stdout == "Published sql@1  (lora, rank 2)\n", done.output
    assert "Already published as sql@1" in shell(url, key, "adapters", "push", str(folder), "--name", "sql").stdout
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        for path in write_adapter(tmp_path / "other", seed=3).iterdir():
            archive.write(path, path.name)
    assert "Published sql@2" in shell(url, key, "adapters", "push", str(tmp_path / "other.zip"), "--name", "sql").stdout
    broken = shell(url, key, "adapters", "push", str(write_adapter(tmp_path / "nan", nan=True)), "--name", "sql")
    assert broken.exit_code == 1
    assert "NaN" in broken.stderr
    refused = shell(url, key, "adapters", "push", "s3://somewhere/else", "--name", "sql")
    assert refused.exit_code == 1
    assert "SLIPSTREAM_PULL_SOURCES" in refused.stderr


class Breaking(httpx.AsyncBaseTransport):
    """A network that fails now and then, and then for good."""

    def __init__(self, fails: set[int], last: int) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._fails, self._last = fails, last
        self.parts = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One request."""
        if "/parts/" in request.url.path:
            self.parts += 1
            if self.parts in self._fails or self.parts > self._last:
                raise httpx.ReadError("broken", request=request)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Give the connections back."""
        await self._inner.aclose()


async def test_it_goes_on_where_it_was_cut_off(world: ApiWorld, url: str, folder: Path) -> None:
    key = await world.key()
    sizes = [path.stat().st_size for path in folder.iterdir()]  # noqa: ASYNC240 - a test's own
    total = sum(registry.part_count(size) for size in sizes)
    first = Breaking({1, 2, 4}, last=total // 2)
    async with SlipstreamClient(url, key, transport=first) as client:
        with pytest.raises(Unavailable):
            await resumable.push_in_parts(client, folder, "sql")
    sent: list[tuple[int, int]] = []
    second = Breaking({2}, last=10**6)
    async with SlipstreamClient(url, key, transport=second) as client:
        version, is_new = await resumable.push_in_parts(client, folder, "sql", lambda *at: sent.append(at))
    assert (version["ref"], is_new) == ("sql@1", True)
    kept = total // 2 - 3  # of the first try's, but for those that failed
    assert second.parts == total - kept + 1
    assert 0 < sent[0][0] <= kept * PART  # a file may end with a short part
    assert sent[-1][0] == sent[-1][1] == sum(sizes)


async def test_a_rejection_is_raised_with_its_reason(world: ApiWorld, url: str, tmp_path: Path) -> None:
    async with SlipstreamClient(url, await world.key()) as client:
        with pytest.raises(AdapterRejected) as refused:
            await resumable.push_in_parts(client, write_adapter(tmp_path / "nan", nan=True), "sql")
        assert (refused.value.code, refused.value.param) == ("non_finite", "adapter_model.safetensors")
        begun = await client.begin_import(name="sql", source="hf://owner/name")
        assert (await client.give_up_import(begun["id"]))["state"] in ("rejected", "validating")
