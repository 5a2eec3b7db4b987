"""Webhooks: signed, in order, again until they are taken, and never to where they must not go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from support.api_app import ADMIN_KEY, ApiWorld
from support.http_server import serving_app

from adapter_registry.records import utc_now
from slipstream.webhooks import GIVEN_UP_S, LEASE_S, Courier

URL = "https://hooks.example.com/slipstream?x=1"
PUBLIC = "93.184.216.34"


@dataclass
class Receiver(httpx.AsyncBaseTransport):
    """The other end: notes what comes, and answers as it is told."""

    statuses: list[int] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One delivery."""
        await request.aread()
        self.requests.append(request)
        status = self.statuses.pop(0) if self.statuses else 204
        if status == 0:
            raise httpx.ConnectError("nobody there", request=request)
        return httpx.Response(status, headers={"Location": "http://127.0.0.1/"})

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


async def public(host: str, port: int) -> Sequence[str]:
    return [PUBLIC]


def courier(world: ApiWorld, receiver: Receiver, **more: Any) -> Courier:
    return Courier(world.webhooks, **{"transport": receiver, "resolve": public, **more})


async def rounds(mine: Courier) -> None:
    """One round, to the end of what it starts."""
    await mine.make()
    await mine.settled()


async def hook(world: ApiWorld, **body: Any) -> dict[str, Any]:
    async with world.client(ADMIN_KEY, **{"X-Slipstream-Tenant": "demo"}) as admin:
        answer = await admin.post("/v1/webhooks", json={"url": URL, **body})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def last(world: ApiWorld) -> dict[str, Any]:
    async with world.client(ADMIN_KEY, **{"X-Slipstream-Tenant": "demo"}) as admin:
        [found] = (await admin.get("/v1/webhooks")).json()["data"]
    assert "secret" not in found
    delivery: dict[str, Any] = found["last_delivery"]
    return delivery


async def test_what_happens_is_told_signed_and_in_order(world: ApiWorld) -> None:
    made, receiver = await hook(world), Receiver()
    version = await world.publish("sql")
    await world.store.set_alias("demo", "sql", "prod", 1, "key_1")
    await world.store.delete_alias("demo", "sql", "prod", "key_1")
    await world.store.delete("demo", "sql", 1)
    await world.key()  # nothing that a webhook is told of
    await rounds(courier(world, receiver))
    assert [body["type"] for body in receiver.bodies] == [
        "version.published", "alias.moved", "alias.moved", "version.deleted",
    ]  # fmt: skip
    first = receiver.bodies[0]
    assert first["data"] == {
        "tenant": "demo", "adapter": "sql", "ref": "sql@1", "by": "", "version": 1, "digest": version.digest,
    }  # fmt: skip
    assert receiver.bodies[1]["data"]["alias"] == "prod"
    for request in receiver.requests:
        assert Webhook(made["secret"]).verify(request.content, dict(request.headers)) == json.loads(request.content)
        with pytest.raises(WebhookVerificationError):
            Webhook(made["secret"]).verify(request.content + b" ", dict(request.headers))
        assert str(request.url) == f"https://{PUBLIC}/slipstream?x=1"  # the address that was checked …
        assert request.headers["host"] == "hooks.example.com"
        assert request.extensions["sni_hostname"] == "hooks.example.com"  # … with the certificate of the name
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 4
    assert (await last(world))["ok"]
    await rounds(courier(world, receiver))
    assert len(receiver.requests) == 4


async def test_only_what_was_asked_for(world: ApiWorld) -> None:
    receiver = Receiver()
    await hook(world, events=["version.deleted"])
    await world.publish("sql")
    await world.store.delete("demo", "sql")
    await rounds(courier(world, receiver))
    assert [body["type"] for body in receiver.bodies] == ["version.deleted"]


async def test_it_is_told_again_until_it_takes_it(world: ApiWorld) -> None:
    receiver, now = Receiver([0, 500, 302, 200]), utc_now()
    await hook(world)
    await world.publish("sql")
    await world.publish("other")
    mine = courier(world, receiver, now=lambda: now)
    for pause_s, status in ((1, None), (2, 500), (4, 302)):
        await rounds(mine)
        await rounds(mine)  # not before its time
        found = await last(world)
        assert (found["ok"], found["status"]) == (False, status)
        now += timedelta(seconds=pause_s + 0.01)
    assert found["tries"] == 3
    await rounds(mine)
    assert [body["data"]["adapter"] for body in receiver.bodies] == ["sql"] * 4 + ["other"]
    ids = [request.headers["webhook-id"] for request in receiver.requests]
    assert len(set(ids[:4])) == 1
    assert len(receiver.requests) == 5


async def test_an_event_that_nobody_takes_for_a_day_is_passed_over(world: ApiWorld) -> None:
    receiver, now = Receiver([500, 500]), utc_now()
    await hook(world)
    await world.publish("sql")
    await world.publish("other")
    mine = courier(world, receiver, now=lambda: now)
    await rounds(mine)
    now += timedelta(seconds=GIVEN_UP_S + 1)
    await rounds(mine)
    assert [body["data"]["adapter"] for body in receiver.bodies] == ["sql", "sql", "other"]


async def test_one_gateway_tells_and_another_goes_on_when_it_dies(world: ApiWorld) -> None:
    receiver = Receiver()
    await hook(world)
    await world.publish("sql")
    dying, other = courier(world, receiver), courier(world, receiver)
    await rounds(dying)
    await world.publish("other")
    await rounds(other)
    assert len(receiver.requests) == 1
    world.webhooks._clock = lambda: 10**9  # its lease is over
    await rounds(other)
    assert len(receiver.requests) == 2
    assert LEASE_S > 0


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",
        "ftp://hooks.example.com/",
        "https://",
        "https://user:password@hooks.example.com/",
        "https://127.0.0.1/",
        "https://localhost/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1:9000/",
        "https://0.0.0.0/",
        "https://hooks.example.com:99999/",
        "https://hooks.exämple.com/",
        "https://a..b/",
        f"https://{'a' * 70}.com/",
        "https://:password@hooks.example.com/",
        "https://hooks.example.com/\n",
        "nonsense",
    ],
)
async def test_addresses_that_are_refused(world: ApiWorld, url: str) -> None:
    async with world.client(ADMIN_KEY, **{"X-Slipstream-Tenant": "demo"}) as admin:
        answer = await admin.post("/v1/webhooks", json={"url": url})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url"), answer.text


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "::1",
        "fe80::1%eth0",
        "::ffff:192.168.0.1",
        "224.0.0.1",
        "64:ff9b::10.0.0.1",
        "2002:7f00:1::",
        "::127.0.0.1",
    ],
)
async def test_a_name_that_leads_inside_is_not_called(world: ApiWorld, address: str) -> None:
    async def inside(host: str, port: int) -> Sequence[str]:
        return [PUBLIC, address]

    receiver = Receiver()
    await hook(world)
    await world.publish("sql")
    await rounds(courier(world, receiver, resolve=inside))
    assert receiver.requests == []
    assert "inside" in (await last(world))["error"]


async def test_events_that_are_refused(world: ApiWorld) -> None:
    async with world.client(ADMIN_KEY, **{"X-Slipstream-Tenant": "demo"}) as admin:
        for events in ([], ["key.created"], ["nonsense"]):
            answer = await admin.post("/v1/webhooks", json={"url": URL, "events": events})
            assert (answer.status_code, answer.json()["error"]["param"].partition(".")[0]) == (400, "events")
        assert (await admin.delete("/v1/webhooks/wh-none")).status_code == 404


async def test_a_real_receiver_inside_the_network(world: ApiWorld) -> None:
    """Over a real socket, by a gateway's own loop, to a host that the operator allowed."""
    got: list[tuple[bytes, dict[str, str]]] = []

    async def receive(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        message = await receive()
        got.append((message["body"], {k.decode(): v.decode() for k, v in scope["headers"]}))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"taken"})

    with serving_app(receive) as url:  # type: ignore[arg-type]  # an ASGI application is enough
        world.rebuild(webhook_private_hosts=("127.0.0.1",))
        made = await hook(world, url=f"{url}/hooks")
        await world.publish("sql")
        await rounds(Courier(world.webhooks, ("127.0.0.1",)))
    [(body, headers)] = got
    assert Webhook(made["secret"]).verify(body, headers)["data"]["ref"] == "sql@1"
    assert (await last(world))["ok"]


async def test_a_receiver_that_is_slow_or_breaks_us_keeps_nobody_waiting(world: ApiWorld) -> None:
    release = asyncio.Event()

    async def slow(host: str, port: int) -> Sequence[str]:
        if host.startswith("slow"):
            await release.wait()
        if host.startswith("odd"):
            raise UnicodeError("label too long")
        return [PUBLIC]

    receiver = Receiver()
    for url in ("https://slow.example.com/", "https://odd.example.com/", URL):
        await hook(world, url=url)
    await world.publish("sql")
    mine = courier(world, receiver, resolve=slow)
    await mine.make()
    await mine.make()  # the slow one is still at it, and is not begun twice
    async with asyncio.timeout(5):
        while not receiver.requests:
            await asyncio.sleep(0.01)
    assert receiver.requests[0].headers["host"] == "hooks.example.com"
    release.set()
    await mine.settled()
    assert len(receiver.requests) == 2
    deliveries = {each.url: await world.webhooks.last("demo", each.id) for each in await world.webhooks.list("demo")}
    odd = deliveries["https://odd.example.com/"]
    assert odd is not None
    assert not odd.ok
