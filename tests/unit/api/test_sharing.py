"""Two tenants: what one has is not there for the other, unless it was shared, and then only to be called."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import pytest_asyncio
from support.api_app import BASE, ApiWorld

PROMPT = {"prompt": "x", "max_tokens": 2}


@pytest_asyncio.fixture
async def other(world: ApiWorld) -> httpx.AsyncClient:
    """A client of the tenant `globex`."""
    return world.client(await world.key("globex"))


async def ask(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/completions", json={**PROMPT, "model": model})


async def share(client: httpx.AsyncClient, **access: Any) -> None:
    response = await client.put("/v1/adapters/sql/access", json=access)
    assert response.status_code == 200, response.text


async def test_unknown_forbidden_and_anothers_look_the_same(
    world: ApiWorld, http: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    version = await world.publish("sql")
    names = ["sql", "demo/sql", "demo/sql@1", "demo/sql@prod", f"sql@{version.digest}", f"demo/sql@{version.digest}"]
    refusals = {(await ask(other, name)).text.replace(name, "NAME") for name in [*names, "demo/none", "none/sql"]}
    assert len(refusals) == 1
    for path in ("", "/versions/1", "/versions/1/files", "/aliases"):
        assert (await other.get(f"/v1/adapters/sql{path}")).status_code == 404
    assert (await other.put("/v1/adapters/sql/access", json={"public": True})).status_code == 404
    assert (await ask(http, "demo/sql")).status_code == 200  # its own, by its full name


async def test_same_names_and_same_content_stay_apart(
    world: ApiWorld, http: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    mine = await world.publish("sql", content="a")
    theirs = await world.publish("sql", tenant="globex", content="a")
    assert mine.digest == theirs.digest
    for client, tenant in ((http, "demo"), (other, "globex")):
        assert (await ask(client, "sql")).status_code == 200
        request = world.engine.requests[-1]
        assert request.adapter is not None
        assert (request.tenant, request.adapter.tenant) == (tenant, tenant)
    assert (await http.delete("/v1/adapters/sql")).status_code == 200
    assert (await ask(http, "sql")).status_code == 404
    assert (await ask(other, "sql")).status_code == 200


async def test_a_shared_adapter_is_called_by_its_owners_name(
    world: ApiWorld, http: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    await world.publish("sql")
    await share(http, tenants=["globex"])
    answer = await ask(other, "demo/sql")
    assert answer.status_code == 200
    assert answer.json()["model"] == "demo/sql@1"
    request = world.engine.requests[-1]
    assert request.adapter is not None
    assert (request.tenant, request.adapter.tenant) == (
        "globex",
        "demo",
    )  # prefixes are the caller's, blobs the owner's
    models = [model["id"] for model in (await other.get("/v1/models")).json()["data"]]
    assert models == [BASE, "demo/sql"]
    assert (await other.get("/v1/models/demo/sql")).json()["owned_by"] == "demo"
    assert (await http.get("/v1/adapters/sql")).json()["access"] == {"public": False, "tenants": ["globex"]}
    assert await world.app.state.runtime.meter.flush()
    assert [row["model"] for row in (await other.get("/v1/usage")).json()["data"]] == ["demo/sql@1"]
    assert (await http.get("/v1/usage")).json()["data"] == []


async def test_shared_means_called_and_nothing_else(
    world: ApiWorld, http: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    await world.publish("sql")
    await share(http, public=True)
    for path in ("", "/versions/1", "/versions/1/files", "/versions/1/files/adapter_config.json"):
        for name in ("sql", "demo%2Fsql", "demo/sql"):
            assert (await other.get(f"/v1/adapters/{name}{path}")).status_code in (400, 404)
    assert (await other.delete("/v1/adapters/sql")).status_code == 404
    body = {
        "model": BASE, "training_file": "file-" + "0" * 24, "slipstream": {"adapter": "demo/sql", "streams": 2},
    }  # fmt: skip
    assert (await other.post("/v1/fine_tuning/jobs", json=body)).status_code == 400


async def test_what_is_no_longer_shared_is_gone_with_the_next_request(
    world: ApiWorld, http: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    await world.publish("sql")
    await share(http, public=True)
    assert (await ask(other, "demo/sql")).status_code == 200
    await share(http)
    assert (await ask(other, "demo/sql")).status_code == 404
    assert [model["id"] for model in (await other.get("/v1/models")).json()["data"]] == [BASE]


async def test_a_key_for_some_models_may_be_for_a_shared_one(world: ApiWorld, http: httpx.AsyncClient) -> None:
    await world.publish("sql")
    await world.publish("sql", tenant="globex", content="b")
    await share(http, public=True)
    async with world.client("admin-key-of-the-tests") as admin:
        made = (await admin.post("/v1/keys", json={"tenant": "globex", "models": ["demo/sql"]})).json()
    async with world.client(made["secret"]) as client:
        assert (await ask(client, "demo/sql@1")).status_code == 200
        assert (await ask(client, "sql")).status_code == 404
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["demo/sql"]


@pytest.mark.parametrize("body", [{"tenants": ["No Name"]}, {"tenants": "globex"}, {"public": "yes"}, {"all": True}])
async def test_bad_access_is_refused(world: ApiWorld, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    await world.publish("sql")
    assert (await http.put("/v1/adapters/sql/access", json=body)).status_code == 400
    assert (await http.put("/v1/adapters/none/access", json={})).status_code == 404


async def test_aliases_are_moved_logged_and_rolled_back(world: ApiWorld, http: httpx.AsyncClient) -> None:
    for content in ("a", "b"):
        await world.publish("sql", content=content)
    for version in (1, 2):
        await http.put("/v1/adapters/sql/aliases/prod", json={"version": version})
    assert (await ask(http, "sql")).json()["model"] == "sql@2"
    back = await http.post("/v1/adapters/sql/aliases/prod/rollback")
    assert back.json() == {"object": "adapter.alias", "name": "sql", "alias": "prod", "version": 1}
    assert (await ask(http, "sql")).json()["model"] == "sql@1"
    page = (await http.get("/v1/adapters/sql/aliases")).json()
    assert page["aliases"] == {"prod": 1}
    assert [(move["before"], move["version"]) for move in page["data"]] == [(2, 1), (1, 2), (None, 1)]
    assert all(move["by"].startswith("key_") for move in page["data"])
    refused = await http.post("/v1/adapters/sql/aliases/canary/rollback")
    assert refused.status_code == 404
    assert "could go back to" in refused.json()["error"]["message"]


async def test_an_aliass_requests_are_split_and_a_user_stays_on_its_side(
    world: ApiWorld, http: httpx.AsyncClient
) -> None:
    for content in ("a", "b"):
        await world.publish("sql", content=content)
    body = {"version": 1, "split": {"version": 2, "weight": 0.4, "shadow": False}}
    assert (await http.put("/v1/adapters/sql/aliases/prod", json=body)).json()["split"] == body["split"]
    assert (await http.get("/v1/adapters/sql")).json()["splits"] == {"prod": body["split"]}
    chosen: dict[str, set[str]] = {}
    for i in range(120):
        user = f"user-{i % 40}"
        answer = await http.post("/v1/completions", json={**PROMPT, "model": "sql", "user": user})
        chosen.setdefault(user, set()).add(answer.json()["model"])
    assert all(len(models) == 1 for models in chosen.values())
    canary = sum(models == {"sql@2"} for models in chosen.values())
    assert 8 <= canary <= 24
    anybody = {(await ask(http, "sql")).json()["model"] for _ in range(60)}
    assert anybody == {"sql@1", "sql@2"}
    assert (await http.delete("/v1/adapters/sql/versions/2")).status_code == 409
    assert (await http.post("/v1/adapters/sql/aliases/prod/rollback")).json()["version"] == 1
    assert {(await ask(http, "sql")).json()["model"] for _ in range(30)} == {"sql@1"}


@pytest.mark.parametrize(
    ("split", "status", "param"),
    [
        ({"version": 1, "weight": 0.5}, 400, "split.version"),
        ({"version": 2, "weight": 0}, 400, "split.weight"),
        ({"version": 2, "weight": 1}, 400, "split.weight"),
        ({"version": 2}, 400, "split.weight"),
        ({"version": 9, "weight": 0.5}, 404, None),
    ],
)
async def test_splits_that_make_no_sense_are_refused(
    world: ApiWorld, http: httpx.AsyncClient, split: dict[str, Any], status: int, param: str | None
) -> None:
    for content in ("a", "b"):
        await world.publish("sql", content=content)
    response = await http.put("/v1/adapters/sql/aliases/prod", json={"version": 1, "split": split})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert (await http.get("/v1/adapters/sql")).json()["aliases"] == {}
