"""Who may call what.

Over 400 lines: tables of routes by who may call them, read beside the tests that go through them.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from support.api_app import ADMIN_KEY, BASE, ApiWorld

from adapter_registry.errors import StoreUnavailable
from adapter_registry.records import utc_now

OPEN = ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"]
LOCKED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/x"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters"),
    ("GET", "/v1/adapters/x"),
    ("DELETE", "/v1/adapters/x"),
    ("GET", "/v1/adapters/x/versions/1"),
    ("DELETE", "/v1/adapters/x/versions/1"),
    ("PUT", "/v1/adapters/x/versions/1/speculation"),
    ("GET", "/v1/adapters/x/versions/1/files"),
    ("GET", "/v1/adapters/x/versions/1/files/f"),
    ("PUT", "/v1/adapters/x/access"),
    ("GET", "/v1/adapters/x/aliases"),
    ("POST", "/v1/adapters/x/aliases/prod/rollback"),
    ("PUT", "/v1/adapters/x/aliases/prod"),
    ("DELETE", "/v1/adapters/x/aliases/prod"),
    ("PUT", "/v1/adapters/x/versions/1/labels"),
    ("GET", "/v1/webhooks"),
    ("POST", "/v1/webhooks"),
    ("DELETE", "/v1/webhooks/w"),
    ("POST", "/v1/imports"),
    ("GET", "/v1/imports"),
    ("GET", "/v1/imports/i"),
    ("PUT", "/v1/imports/i/files/f/parts/0"),
    ("POST", "/v1/imports/i/complete"),
    ("DELETE", "/v1/imports/i"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/f"),
    ("DELETE", "/v1/files/f"),
    ("GET", "/v1/files/f/content"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/j"),
    ("POST", "/v1/fine_tuning/jobs/j/cancel"),
    ("GET", "/v1/fine_tuning/jobs/j/events"),
    ("GET", "/v1/fine_tuning/jobs/j/checkpoints"),
    ("GET", "/v1/cluster"),
    ("GET", "/v1/tenants"),
    ("GET", "/v1/tenants/x"),
    ("PUT", "/v1/tenants/x"),
    ("GET", "/v1/usage"),
    ("GET", "/v1/audit"),
    ("GET", "/v1/users"),
    ("PUT", "/v1/users/u"),
    ("DELETE", "/v1/users/u"),
    ("POST", "/v1/keys"),
    ("GET", "/v1/keys?tenant=x"),
    ("POST", "/v1/keys/k/rotate?tenant=x"),
    ("DELETE", "/v1/keys/k?tenant=x"),
]


@pytest.mark.parametrize("path", OPEN)
async def test_open_routes_need_no_key(world: ApiWorld, path: str) -> None:
    async with world.client(None) as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(("method", "path"), LOCKED)
@pytest.mark.parametrize("key", [None, "sk-slip-wrong", "", "é"])
async def test_everything_else_needs_one(world: ApiWorld, method: str, path: str, key: str | None) -> None:
    async with world.client(None) as client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
        response = await client.request(method, path, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")


def test_the_lists_above_are_complete(world: ApiWorld) -> None:
    paths = set(world.app.openapi()["paths"])
    tested = {path.split("?")[0] for _, path in LOCKED} | set(OPEN)
    assert len(paths) == len({p for p in tested if p not in ("/openapi.json", "/docs")})


async def test_keys_are_made_listed_and_revoked(world: ApiWorld, admin: httpx.AsyncClient) -> None:
    made = await admin.post("/v1/keys", json={"tenant": "acme", "label": "ci"})
    assert made.status_code == 201
    secret, key_id = made.json()["secret"], made.json()["id"]
    listed = await admin.get("/v1/keys", params={"tenant": "acme"})
    assert [key["id"] for key in listed.json()["data"]] == [key_id]
    assert secret not in listed.text
    assert "sha256" not in listed.text
    async with world.client(secret) as client:
        assert (await client.get("/v1/models")).status_code == 200
        gone = await admin.delete(f"/v1/keys/{key_id}", params={"tenant": "acme"})
        assert gone.status_code == 204
        assert (await client.get("/v1/models")).status_code == 401
    again = await admin.delete(f"/v1/keys/{key_id}", params={"tenant": "acme"})
    assert again.status_code == 404


async def test_only_the_admin_manages_keys(http: httpx.AsyncClient) -> None:
    for response in (
        await http.post("/v1/keys", json={"tenant": "demo"}),
        await http.get("/v1/keys", params={"tenant": "demo"}),
        await http.delete("/v1/keys/x", params={"tenant": "demo"}),
    ):
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "role_required"


@pytest.mark.parametrize("tenant", ["", "UPPER", "../x", "a" * 64, "é"])
async def test_bad_tenants_are_refused(admin: httpx.AsyncClient, tenant: str) -> None:
    assert (await admin.post("/v1/keys", json={"tenant": tenant})).status_code == 400
    assert (await admin.get("/v1/keys", params={"tenant": tenant})).status_code == 400
    headers = {"X-Slipstream-Tenant": tenant.encode()}
    assert (await admin.get("/v1/adapters", headers=headers)).status_code == 400  # type: ignore[arg-type]


async def test_the_admin_acts_for_a_tenant(world: ApiWorld, admin: httpx.AsyncClient) -> None:
    await world.publish("sql", tenant="acme")
    bare = await admin.get("/v1/adapters")
    assert bare.status_code == 400
    assert "X-Slipstream-Tenant" in bare.json()["error"]["message"]
    assert [model["id"] for model in (await admin.get("/v1/models")).json()["data"]] == [BASE]
    headers = {"X-Slipstream-Tenant": "acme"}
    assert (await admin.get("/v1/adapters", headers=headers)).json()["data"][0]["name"] == "sql"
    assert len((await admin.get("/v1/models", headers=headers)).json()["data"]) == 2


async def test_a_tenant_acts_only_for_itself(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/adapters", headers={"X-Slipstream-Tenant": "demo"})).status_code == 200
    assert (await http.get("/v1/adapters", headers={"X-Slipstream-Tenant": "acme"})).status_code == 403


async def test_known_keys_and_names_outlive_a_short_outage(world: ApiWorld) -> None:
    await world.publish("sql")
    known, fresh = await world.key(), await world.key()
    body = {"model": "sql", "prompt": "x"}
    async with world.client(known) as client, world.client(fresh) as stranger:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        world.store.outage = StoreUnavailable("redis at 10.0.0.7:6379 is away")
        world.clock.advance(60)
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        refused = await stranger.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert "10.0.0.7" not in refused.text
        unseen = await client.post("/v1/completions", json=body | {"model": "sql@1"})
        assert unseen.status_code == 503
        world.clock.advance(600)
        assert (await client.post("/v1/completions", json=body)).status_code == 503
        world.store.outage = None
        assert (await stranger.post("/v1/completions", json=body)).status_code == 200


async def test_an_outage_does_not_bring_removed_things_back(world: ApiWorld) -> None:
    await world.publish("sql")
    body = {"model": "sql", "prompt": "x"}
    async with world.client(await world.key()) as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert (await client.delete("/v1/adapters/sql")).status_code == 200
        world.store.outage = StoreUnavailable("away")
        assert (await client.post("/v1/completions", json=body)).status_code == 503


async def test_a_revoked_key_is_forgotten_in_seconds_elsewhere(world: ApiWorld, admin: httpx.AsyncClient) -> None:
    made = (await admin.post("/v1/keys", json={"tenant": "acme"})).json()
    async with world.client(made["secret"]) as client:
        assert (await client.get("/v1/models")).status_code == 200
        await world.store.delete_key("acme", made["id"])  # at another gateway
        world.clock.advance(6)
        assert (await client.get("/v1/models")).status_code == 401


async def test_admin_key_is_not_a_tenants(world: ApiWorld) -> None:
    async with world.client(ADMIN_KEY) as client:
        response = await client.post("/v1/completions", json={"model": BASE, "prompt": "x"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "tenant_required"


async def made(world: ApiWorld, **fields: Any) -> tuple[httpx.AsyncClient, dict[str, Any]]:
    """A client with a new key of `demo`."""
    async with world.client(ADMIN_KEY) as admin:
        response = await admin.post("/v1/keys", json={"tenant": "demo", **fields})
    assert response.status_code == 201, response.text
    return world.client(response.json()["secret"]), response.json()


CALLS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/adapters"),
    ("GET", "/v1/adapters/sql"),
    ("GET", "/v1/adapters/sql/aliases"),
    ("GET", "/v1/usage"),
]
PUBLISHES = [
    ("POST", "/v1/adapters"),
    ("DELETE", "/v1/adapters/none"),
    ("DELETE", "/v1/adapters/none/versions/1"),
    ("PUT", "/v1/adapters/sql/access"),
    ("PUT", "/v1/adapters/sql/aliases/prod"),
    ("POST", "/v1/adapters/sql/aliases/prod/rollback"),
    ("DELETE", "/v1/adapters/sql/aliases/none"),
    ("PUT", "/v1/adapters/sql/versions/1/speculation"),
    ("GET", "/v1/adapters/sql/versions/1/files"),
    ("GET", "/v1/adapters/sql/versions/1/files/none"),
    ("GET", "/v1/files"),
    ("PUT", "/v1/adapters/x/versions/1/labels"),
    ("POST", "/v1/imports"),
    ("GET", "/v1/imports"),
    ("GET", "/v1/imports/i"),
    ("PUT", "/v1/imports/i/files/f/parts/0"),
    ("POST", "/v1/imports/i/complete"),
    ("DELETE", "/v1/imports/i"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files/none/content"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/jobs"),
]
MANAGES = [
    ("GET", "/v1/users"),
    ("PUT", "/v1/users/ann"),
    ("DELETE", "/v1/users/none"),
    ("GET", "/v1/webhooks"),
    ("POST", "/v1/webhooks"),
    ("DELETE", "/v1/webhooks/none"),
    ("GET", "/v1/audit"),
    ("GET", "/v1/keys"),
    ("POST", "/v1/keys"),
    ("DELETE", "/v1/keys/none"),
    ("POST", "/v1/keys/none/rotate"),
]
BODIES = {
    "/v1/users/ann": {"role": "caller"},
    "/v1/adapters/x/versions/1/labels": {"labels": {}},
    "/v1/imports": {"name": "sql", "source": "hf://a/b"},
    "/v1/webhooks": {"url": "https://example.com/x"},
    "/v1/adapters/sql/access": {},
    "/v1/adapters/sql/aliases/prod": {"version": 1},
    "/v1/adapters/sql/versions/1/speculation": {"enabled": True},
    "/v1/fine_tuning/jobs": {"model": BASE, "training_file": "file-" + "0" * 24},
    "/v1/keys": {},
    "/v1/keys/none/rotate": {},
}


@pytest.mark.parametrize("role", ["caller", "publisher", "admin"])
@pytest.mark.parametrize(("method", "path"), CALLS + PUBLISHES + MANAGES)
async def test_a_role_may_what_it_says_and_no_more(world: ApiWorld, role: str, method: str, path: str) -> None:
    await world.publish("sql")
    allowed = {"caller": CALLS, "publisher": CALLS + PUBLISHES, "admin": CALLS + PUBLISHES + MANAGES}[role]
    client, _ = await made(world, role=role)
    async with client:
        body = {"json": BODIES[path]} if method in ("POST", "PUT") and path in BODIES else {}
        response = await client.request(method, path, **body)  # type: ignore[arg-type]
    forbidden = response.status_code == 403
    assert forbidden == ((method, path) not in allowed), response.text
    if forbidden:
        assert response.json()["error"]["code"] == "role_required"


async def test_a_tenants_admin_manages_its_own_keys_and_no_others(world: ApiWorld) -> None:
    client, key = await made(world, role="admin")
    async with client:
        new = await client.post("/v1/keys", json={"role": "caller", "label": "app"})
        assert (new.status_code, new.json()["tenant"], new.json()["role"]) == (201, "demo", "caller")
        listed = (await client.get("/v1/keys")).json()["data"]
        assert {each["id"] for each in listed} == {key["id"], new.json()["id"]}
        assert (await client.delete(f"/v1/keys/{new.json()['id']}")).status_code == 204
        assert (await client.post("/v1/keys", json={"tenant": "acme"})).status_code == 403
        assert (await client.get("/v1/keys?tenant=acme")).status_code == 403
        assert (await client.put("/v1/tenants/demo", json={})).status_code == 403


async def test_a_key_for_some_models_sees_no_others(world: ApiWorld) -> None:
    await world.publish("sql")
    await world.publish("mail")
    client, _ = await made(world, models=["sql"])
    async with client:
        assert [each["id"] for each in (await client.get("/v1/models")).json()["data"]] == ["sql"]
        for model, status in (("sql", 200), ("sql@1", 200), ("mail", 404), (BASE, 404), ("none", 404)):
            answer = await client.post("/v1/completions", json={"model": model, "prompt": "x"})
            assert answer.status_code == status
            if status == 404:
                assert answer.json()["error"]["code"] == "model_not_found"
        for name, status in (("sql", 200), ("mail", 404)):
            for path in ("", "/versions/1", "/aliases"):
                assert (await client.get(f"/v1/adapters/{name}{path}")).status_code == status
        listed = (await client.get("/v1/adapters")).json()["data"]
        assert [(each["name"], each["access"]) for each in listed] == [("sql", None)]
        assert (await client.delete("/v1/adapters/sql")).status_code == 403


async def test_models_of_a_key_are_kept_as_they_are_looked_for(world: ApiWorld) -> None:
    client, key = await made(world, models=[BASE.rpartition("/")[2], "demo/sql", "acme/mail"])
    assert (key["models"], key["role"]) == ([BASE, "sql", "acme/mail"], "caller")
    async with client:
        assert (await client.post("/v1/completions", json={"model": BASE, "prompt": "x"})).status_code == 200


async def test_an_expired_key_opens_nothing(world: ApiWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = utc_now() + timedelta(seconds=30)
    client, _ = await made(world, expires_at=ends.isoformat())
    async with client:
        assert (await client.get("/v1/models")).status_code == 200
        monkeypatch.setattr("slipstream.api.auth.utc_now", lambda: ends)  # also one that a gateway remembers
        refused = await client.get("/v1/models")
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "expired_api_key"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2999-01-01T00:00:00"}, "expires_at"),  # of no zone
        ({"role": "owner"}, "role"),
        ({"role": "publisher", "models": ["sql"]}, "role"),
        ({"models": ["sql@3"]}, "models"),
        ({"models": []}, "models"),
        ({"models": "sql"}, "models"),
    ],
)
async def test_bad_wishes_for_a_key_are_refused_by_name(
    admin: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await admin.post("/v1/keys", json={"tenant": "demo", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_rotated_key_works_for_its_grace_and_its_heir_may_the_same(
    world: ApiWorld, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, old = await made(world, role="caller", label="app", models=[BASE])
    path = f"/v1/keys/{old['id']}/rotate?tenant=demo"
    new = (await admin.post(path, json={"grace_s": 60})).json()
    assert {name: new[name] for name in ("role", "label", "models")} == {
        "role": "caller",
        "label": "app",
        "models": [BASE],
    }
    assert new["id"] != old["id"]
    async with client, world.client(new["secret"]) as heir:
        assert (await client.get("/v1/models")).status_code == 200
        later = utc_now() + timedelta(seconds=61)
        monkeypatch.setattr("slipstream.api.auth.utc_now", lambda: later)
        assert (await client.get("/v1/models")).status_code == 401
        assert (await heir.get("/v1/models")).status_code == 200
    again = await admin.post(path, json={})
    assert (again.status_code, new["id"] in again.text) == (409, True)  # or the next heir would end with the old key
    next_one = await admin.post(f"/v1/keys/{new['id']}/rotate?tenant=demo", json={})
    assert (next_one.status_code, next_one.json()["expires_at"]) == (201, None)
    assert (await admin.post("/v1/keys/none/rotate?tenant=demo", json={})).status_code == 404
    assert (await admin.post(path, json={"grace_s": -1})).json()["error"]["param"] == "grace_s"


async def test_the_last_use_of_a_key_is_shown(world: ApiWorld, admin: httpx.AsyncClient) -> None:
    client, key = await made(world)
    assert key["last_used_at"] is None
    async with client:
        await client.get("/v1/models")
        await asyncio.sleep(0.01)
    (shown,) = (await admin.get("/v1/keys?tenant=demo")).json()["data"]
    assert utc_now() - datetime.fromisoformat(shown["last_used_at"]) < timedelta(minutes=2)


async def test_the_audit_log_says_who(world: ApiWorld, admin: httpx.AsyncClient) -> None:
    client, key = await made(world, role="admin", label="boss")
    async with client:
        for content in ("a", "b"):
            await world.publish("sql", content=content)
        await client.put("/v1/adapters/sql/aliases/prod", json={"version": 1})
        await client.put("/v1/adapters/sql/access", json={"public": True})
        await client.delete("/v1/adapters/sql/versions/2")
        await client.put("/v1/adapters/sql/aliases/none", json={"version": 9})  # refused: nothing was done
        page = (await client.get("/v1/audit?limit=3")).json()
        assert [(e["by"], e["action"], e["subject"]) for e in page["data"]] == [
            (key["id"], "version.deleted", "sql@2"),
            (key["id"], "access.changed", "sql"),
            (key["id"], "alias.moved", "sql@prod"),
        ]
        assert page["has_more"]
        rest = (await client.get(f"/v1/audit?before={page['data'][-1]['id']}")).json()
        assert [e["action"] for e in rest["data"]] == ["version.published", "version.published", "key.created"]
        assert rest["data"][-1]["by"] == "admin"
        assert (await client.get("/v1/audit?tenant=acme")).status_code == 403
        assert (await client.get("/v1/audit?before=x")).status_code == 400
    assert (await admin.get("/v1/audit?tenant=demo")).json()["data"] == page["data"] + rest["data"]


async def test_a_user_s_keys_may_no_more_than_the_user(world: ApiWorld, admin: httpx.AsyncClient) -> None:
    put = await admin.put("/v1/users/ann@example.com?tenant=demo", json={"role": "publisher"})
    assert (put.status_code, put.json()["role"]) == (200, "publisher")
    body = {"tenant": "demo", "user": "ann@example.com"}
    refused = await admin.post("/v1/keys", json={**body, "role": "admin"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert (await admin.post("/v1/keys", json={**body, "user": "bob"})).status_code == 404
    made = (await admin.post("/v1/keys", json={**body, "role": "publisher"})).json()
    other = (await admin.post("/v1/keys", json={"tenant": "demo"})).json()
    async with world.client(made["secret"]) as ann:
        assert (await ann.get("/v1/files")).status_code == 200
        since = put.json()["created_at"]
        lowered = await admin.put("/v1/users/ann@example.com?tenant=demo", json={"role": "caller"})
        assert lowered.json()["created_at"] == since
        assert (await ann.get("/v1/files")).status_code == 403
        heir = (await admin.post(f"/v1/keys/{made['id']}/rotate?tenant=demo", json={"grace_s": 60})).json()
        assert (heir["user"], heir["role"]) == ("ann@example.com", "caller")
        assert [user["name"] for user in (await admin.get("/v1/users?tenant=demo")).json()["data"]] == [
            "ann@example.com"
        ]
        gone = (await admin.delete("/v1/users/ann@example.com?tenant=demo")).json()
        assert sorted(gone["keys"]) == sorted([made["id"], heir["id"]])
        assert (await ann.get("/v1/models")).status_code == 401
    async with world.client(other["secret"]) as nobody:
        assert (await nobody.get("/v1/models")).status_code == 200
    assert (await admin.delete("/v1/users/ann@example.com?tenant=demo")).status_code == 404
    assert (await admin.put("/v1/users/an%20n?tenant=demo", json={"role": "caller"})).status_code == 400
