"""Demo adapters: found beside the package or in it, published once, and never in anybody's way."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_app import ADMIN_KEY, BASE, ApiWorld, form_files, write_adapter

from deployments.demos import DEMO_LIST, Demo, PublishedDemo, demo_folder, publish_demos, read_demos
from deployments.serve_local import Started, announcement
from slipstream.client import SlipstreamClient
from slipstream.errors import ConfigError
from slipstream.testing import FAKE_BASE, FakeEngine

ROOT = Path(__file__).resolve().parents[3]


def write_demos(folder: Path, *names: str, **changes: Any) -> Path:
    """A folder of demo adapters for the fake base model."""
    rows = []
    for seed, name in enumerate(names):
        write_adapter(folder / name, seed=seed)
        (folder / name / "training_card.md").write_text("# Card")
        rows.append({"name": name, "description": f"About {name}", "prompt": f"{name}'s\nprompt:", **changes})
    (folder / DEMO_LIST).write_text(json.dumps(rows))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> ApiWorld:
    return ApiWorld(tmp_path / "uploads")


async def start(world: ApiWorld, folder: Path, *models: str, key: str = ADMIN_KEY) -> tuple[list[str], list[str]]:
    """What a start publishes, as references, and what it warns of."""
    warnings: list[str] = []
    transport = httpx.ASGITransport(world.app)
    async with SlipstreamClient("http://test", key, tenant="demo", transport=transport) as client:
        published = await publish_demos(client, folder, models or (BASE,), warnings.append)
    return [each.ref for each in published], warnings


async def test_every_start_publishes_once_per_content(world: ApiWorld, tmp_path: Path) -> None:
    folder = write_demos(tmp_path / "demos", "snips", "wikisql")
    for _ in range(2):
        assert await start(world, folder) == (["snips@1", "wikisql@1"], [])
    write_adapter(folder / "snips", seed=9)  # a release with a better one
    assert await start(world, folder) == (["snips@2", "wikisql@1"], [])
    async with world.client(await world.key("demo")) as http:
        answer = await http.post("/v1/completions", json={"model": "snips", "prompt": "x"})
        assert answer.json()["model"] == "snips@2"
        listed = (await http.get("/v1/adapters/snips/versions/1/files")).json()["data"]
    assert [row["path"] for row in listed if row["attachment"]] == ["training_card.md"]
    async with world.client(await world.key("other")) as http:
        assert (await http.get("/v1/adapters")).json()["data"] == []


async def test_somebodys_own_adapter_of_that_name_is_left_alone(world: ApiWorld, tmp_path: Path) -> None:
    folder = write_demos(tmp_path / "demos", "snips", "wikisql")
    mine = write_adapter(tmp_path / "mine", seed=7)
    async with world.client(await world.key("demo")) as http:
        assert (await http.post("/v1/adapters", data={"name": "snips"}, files=form_files(mine))).status_code == 201
    assert await start(world, folder) == (["wikisql@1"], [])
    assert [each.version for each in (await world.store.get("demo", "snips")).versions] == [1]


async def test_only_for_the_base_they_were_trained_on(world: ApiWorld, tmp_path: Path) -> None:
    folder = write_demos(tmp_path / "demos", "snips")
    other = replace(FAKE_BASE, id="fake/other-2b", base_digest="sha256:" + "2" * 64)
    world.rebuild(engines={other.id: FakeEngine(other), BASE: world.engine})
    assert await start(world, folder, other.id, BASE) == (["snips@1"], [])
    world.rebuild(engines={other.id: FakeEngine(other)})
    assert await start(world, folder, other.id) == ([], [])


async def test_the_digest_decides_where_an_adapter_names_one(world: ApiWorld, tmp_path: Path) -> None:
    folder = write_demos(tmp_path / "demos", "snips")
    options = folder / "snips" / "slipstream.json"
    options.write_text(json.dumps({"base_digest": "sha256:" + "3" * 64}))  # the served model's name, other weights
    assert await start(world, folder) == ([], [])
    options.write_text(json.dumps({"base_digest": FAKE_BASE.base_digest}))
    assert await start(world, folder) == (["snips@1"], [])


async def test_what_fails_is_said_and_the_rest_goes_on(world: ApiWorld, tmp_path: Path) -> None:
    folder = write_demos(tmp_path / "demos", "broken", "missing", "snips")
    write_adapter(folder / "broken", nan=True)
    for path in (folder / "missing").iterdir():
        path.unlink()
    refs, warnings = await start(world, folder)
    assert refs == ["snips@1"]
    assert [warning.split("'")[1] for warning in warnings] == ["broken", "missing"]
    assert await start(world, folder, key="not-the-admin-key") == (
        [],
        [
            f"The demo adapter '{name}' was not published: This API key is unknown or has been revoked."
            for name in ("broken", "missing", "snips")
        ],
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"name": "../x", "description": "d", "prompt": "p"}]',
        '[{"name": "x", "description": "d", "prompt": ""}]',
        '[{"name": "x", "description": "d", "prompt": "p", "max_tokens": 0}]',
        '[{"name": "x", "description": "d", "prompt": "p", "folder": "y"}]',
    ],
)
def test_a_broken_list_says_how_to_go_on(tmp_path: Path, text: str) -> None:
    (tmp_path / DEMO_LIST).write_text(text)
    with pytest.raises(ConfigError, match="SLIPSTREAM_DEMO_ADAPTERS=false"):
        read_demos(tmp_path)


def test_they_are_found_in_a_wheel_and_in_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "deployments"
    assert demo_folder(package) is None
    checkout = tmp_path / "examples" / "adapters"
    checkout.mkdir(parents=True)
    assert demo_folder(package) is None  # some other project's examples
    write_demos(checkout)
    assert demo_folder(package) == checkout
    write_demos(package / "demo_adapters", "snips")
    assert demo_folder(package) == package / "demo_adapters"


def test_ours_travel_in_the_wheel_and_are_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"examples/adapters": "deployments/demo_adapters"}
    found = demo_folder()
    assert found == ROOT / "examples" / "adapters"
    folders = {path.name for path in found.iterdir() if path.is_dir()}
    assert {demo.name for demo in read_demos(found)} == folders


# --- what a person reads ---

STARTED = Started("http://127.0.0.1:8000", "sk-slip-x", "fake/base-1b")
SNIPS = PublishedDemo(Demo(name="snips", description="intents", prompt='It\'s\n"this" é', max_tokens=50), "snips@3")
WIKISQL = PublishedDemo(Demo(name="wikisql", description="queries", prompt="p"), "wikisql@1")


def curl_words(lines: list[str]) -> list[str]:
    start = next(number for number, line in enumerate(lines) if line.startswith("  curl "))
    return shlex.split(" ".join((lines[start].removesuffix("\\"), lines[start + 1])))


def test_the_curl_line_shows_a_demo_and_how_to_read_its_speed() -> None:
    lines = list(announcement(replace(STARTED, demos=(SNIPS, WIKISQL)), 12.3))
    words = curl_words(lines)
    assert words[1] == "http://127.0.0.1:8000/v1/completions"
    assert json.loads(words[-1]) == {
        "model": "snips@3",
        "prompt": 'It\'s\n"this" é',
        "max_tokens": 50,
        "temperature": 0,
    }
    text = "\n".join(lines)
    assert "usage.completion_tokens / usage.decode_steps" in text
    assert "wikisql@1 (queries)" in text
    assert "Authorization: Bearer sk-slip-x" in text


def test_without_a_demo_it_shows_the_base() -> None:
    words = curl_words(list(announcement(STARTED, 12.3)))
    assert words[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "fake/base-1b"
