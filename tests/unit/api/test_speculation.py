"""A version's speculation policy over HTTP, and what `"speculation": "auto"` does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_app import BASE, ApiWorld, form_files, write_adapter

from adapter_registry.errors import StoreUnavailable
from slipstream.testing import FakeAnswer

URL = "/v1/adapters/sql/versions/1/speculation"
OFF = {"enabled": False, "reason": "expected speed-up 1.04"}


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def ask(http: httpx.AsyncClient, world: ApiWorld, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """What reached the engine, and the usage of the answer."""
    world.engine.enqueue(FakeAnswer((" a", " b", " c", " d", " e")))
    response = await http.post("/v1/completions", json={"model": "sql", "prompt": "x", **fields})
    assert response.status_code == 200, response.text
    return world.engine.requests[-1].speculation, response.json()["usage"]


async def test_auto_follows_the_policy_at_once(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await world.publish("sql")
    _, on = await ask(http, world)
    assert on["decode_steps"] < on["completion_tokens"] == 5
    changed = await http.put(URL, json=OFF)
    assert changed.status_code == 200
    assert changed.json()["speculation"] == OFF
    for fields in ({}, {"speculation": "auto"}, {"speculation": None}):
        sent, off = await ask(http, world, **fields)
        assert sent is False  # a draft cap of 0
        assert off["decode_steps"] == off["completion_tokens"] == 5
    await http.put(URL, json={"enabled": True, "reason": "measured again"})
    _, again = await ask(http, world)
    assert again["decode_steps"] == on["decode_steps"]


@pytest.mark.parametrize("asked", [True, 3, 1, 0, False])
@pytest.mark.parametrize("enabled", [True, False])
async def test_what_a_request_says_itself_counts(
    world: ApiWorld, http: httpx.AsyncClient, asked: bool | int, enabled: bool
) -> None:
    await world.publish("sql")
    await http.put(URL, json={"enabled": enabled})
    sent, usage = await ask(http, world, speculation=asked)
    assert sent is asked
    assert (usage["decode_steps"] < usage["completion_tokens"]) == bool(asked)


async def test_chat_follows_it_too_and_each_version_has_its_own(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await world.publish("sql", content="a")
    await world.publish("sql", content="b")
    await http.put(URL, json=OFF)
    messages = [{"role": "user", "content": "x"}]
    for model, sent in (("sql@1", False), ("sql@2", None), ("sql", None), (BASE, None)):
        response = await http.post("/v1/chat/completions", json={"model": model, "messages": messages})
        assert response.status_code == 200
        assert world.engine.requests[-1].speculation is sent


async def test_a_policy_is_known_through_an_outage_of_the_registry(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await world.publish("sql")
    await http.put(URL, json=OFF)
    assert (await ask(http, world))[0] is False
    world.store.outage = StoreUnavailable("away")
    assert (await ask(http, world))[0] is False


async def test_versions_show_their_policy(world: ApiWorld, http: httpx.AsyncClient) -> None:
    version = await world.publish("sql")
    shown = (await http.get("/v1/adapters/sql/versions/1")).json()
    assert shown["speculation"] == {"enabled": True, "reason": ""}
    await http.put(URL, json=OFF)
    shown = (await http.get("/v1/adapters/sql/versions/1")).json()
    assert (shown["speculation"], shown["digest"]) == (OFF, version.digest)
    assert (await http.get("/v1/adapters/sql")).json()["versions"][0]["speculation"] == OFF


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"reason": "x"},
        {"enabled": "off"},
        {"enabled": 0},
        {"enabled": None},
        {"enabled": True, "reason": "x" * 501},
        {"enabled": True, "reason": None},
        {"enabled": True, "reason": 5},
        {"enabled": True, "reason": "\ud800"},
        {"enabled": True, "why": "x"},
        [True],
        True,
    ],
)
async def test_bad_bodies(world: ApiWorld, http: httpx.AsyncClient, body: Any) -> None:
    await world.publish("sql")
    # As escapes: half a surrogate pair has no bytes of its own.
    refusal(await http.put(URL, content=json.dumps(body), headers={"content-type": "application/json"}))
    assert (await http.get("/v1/adapters/sql")).json()["versions"][0]["speculation"]["enabled"]


async def test_the_longest_reason_is_kept(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await world.publish("sql")
    assert (await http.put(URL, json={"enabled": False, "reason": "✓" * 500})).status_code == 200
    assert (await http.get("/v1/adapters/sql/versions/1")).json()["speculation"]["reason"] == "✓" * 500


async def test_unknown_versions_and_other_tenants_look_alike(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await world.publish("sql")
    for url in ("/v1/adapters/sql/versions/2/speculation", "/v1/adapters/other/versions/1/speculation"):
        refusal(await http.put(url, json=OFF), 404)
    refusal(await http.put("/v1/adapters/sql/versions/0/speculation", json=OFF))
    refusal(await http.put("/v1/adapters/Bad/versions/1/speculation", json=OFF))
    async with world.client(await world.key("other")) as stranger:
        texts = [
            refusal(await stranger.put(f"/v1/adapters/{name}/versions/1/speculation", json=OFF), 404)["message"]
            for name in ("sql", "nil")
        ]
    assert texts[0] == texts[1].replace("nil", "sql")
    assert (await http.get("/v1/adapters/sql/versions/1")).json()["speculation"]["enabled"]


# --- as part of an upload ---


async def push(http: httpx.AsyncClient, folder: Path, **fields: str) -> httpx.Response:
    return await http.post("/v1/adapters", data={"name": "sql", **fields}, files=form_files(folder))


async def test_an_upload_may_begin_with_speculation_off(http: httpx.AsyncClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora")
    reason = "✓" * 500
    first = await push(http, folder, speculation="off", speculation_reason=reason)
    assert first.status_code == 201, first.text
    assert first.json()["speculation"] == {"enabled": False, "reason": reason}
    again = await push(http, folder, speculation="on")  # the same content: its policy stays
    assert again.status_code == 200
    assert again.json()["speculation"] == {"enabled": False, "reason": reason}
    other = await push(http, write_adapter(tmp_path / "other", seed=1))
    assert other.json()["speculation"] == {"enabled": True, "reason": ""}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"speculation": "maybe"}, "speculation"),
        ({"speculation": "true"}, "speculation"),
        ({"speculation": ""}, "speculation"),
        ({"speculation_reason": "x" * 501}, "speculation_reason"),
        ({"speculation": "off", "speculation_reason": "x" * 5000}, "speculation_reason"),
    ],
)
async def test_bad_form_fields(http: httpx.AsyncClient, tmp_path: Path, fields: dict[str, str], param: str) -> None:
    error = refusal(await push(http, write_adapter(tmp_path / "lora"), **fields))
    assert error["param"] == param
    assert (await http.get("/v1/adapters")).json()["data"] == []
