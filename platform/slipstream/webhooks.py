"""Delivers webhooks: signed as the Standard Webhooks specification says (standardwebhooks.com), in order, again until they
are taken, by whichever gateway has the tenant's lease.

A tenant names the address and the server calls it, from inside the operator's network; so only `https://` and public
addresses are called, the address that was checked is the one that is connected to, and no redirect is followed. What may
be called beside that is a setting.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
from standardwebhooks import Webhook

from adapter_registry.records import AuditAction, AuditEntry, utc_now
from adapter_registry.webhooks import Delivery, WebhookRecord, WebhookStore
from slipstream.errors import InvalidRequest

log = logging.getLogger("slipstream.webhooks")

LEASE_S = 30.0
TIMEOUT_S = 10.0  # of one delivery
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0  # between tries; twice as long each time
GIVEN_UP_S = 24 * 3600.0  # an event that nobody took for so long is passed over
AT_A_TIME = 100  # events of a webhook in one round
_TRANSLATED = [ipaddress.ip_network(each) for each in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")]
_RESOLVERS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="slipstream-webhook-names")
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class _Refused(Exception):
    """An address that is not called."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host."""
    # In threads of their own: names that tenants chose may take as long as they like.
    asked = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, asked)
    return [str(each[4][0]) for each in found]


def check_url(url: str, private: Sequence[str]) -> None:
    """Raise `InvalidRequest` for a URL that would never be called. `private`: hosts that may be called all the same."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")  # as looking it up will
    except ValueError:
        host, parts = "", urlsplit("")
    if (
        parts.scheme not in ("https", "http")
        or not host
        or "@" in parts.netloc
        or not url.isascii()
        or not url.isprintable()
    ):
        raise _bad_url("'url' is an address such as https://example.com/hooks, without a password in it.")
    if host in private:
        return
    if parts.scheme != "https":
        raise _bad_url("'url' must be https://.")
    if host == "localhost" or (_is_number(host) and not _is_public(host)):
        raise _bad_url("'url' names an address inside this server's network, which is not called.")


@dataclass(slots=True)
class Courier:
    """One gateway's part. `make` is called by one task."""

    webhooks: WebhookStore
    private: Sequence[str] = ()
    resolve: Resolve = resolve
    now: Callable[[], datetime] = utc_now
    transport: httpx.AsyncBaseTransport | None = None
    note: Callable[[bool], None] = lambda ok: None  # told of each try
    holder: str = field(default_factory=lambda: secrets.token_hex(8))
    _running: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # webhook → who delivers to it
    _tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)  # takes a while to make
    _waits: dict[str, tuple[str, int, datetime]] = field(default_factory=dict)  # webhook → event, tries, not before

    async def make(self) -> None:
        """Begin to deliver what there is, to every tenant whose lease is to be had; a slow receiver keeps nobody waiting."""
        leased = [t for t in await self.webhooks.tenants() if await self.webhooks.lease(t, self.holder, LEASE_S)]
        known = [webhook for tenant in leased for webhook in await self.webhooks.list(tenant)]
        self._waits = {webhook.id: self._waits[webhook.id] for webhook in known if webhook.id in self._waits}
        for webhook in known:
            if webhook.id not in self._running:
                task = asyncio.create_task(self._keep_in_bounds(webhook))
                self._running[webhook.id] = task
                task.add_done_callback(lambda _, id_=webhook.id: self._running.pop(id_, None))  # type: ignore[misc]

    async def settled(self) -> None:
        """Wait until nothing is being delivered."""
        while self._running:
            await asyncio.wait(list(self._running.values()))
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Stop; another gateway goes on when the leases are over."""
        for task in self._running.values():
            task.cancel()
        await self.settled()

    async def _keep_in_bounds(self, webhook: WebhookRecord) -> None:
        try:
            await self._deliver(webhook)
        except Exception as error:  # a task's top loop: nobody else would hear of it, and the next round may succeed
            log.warning("webhook %s of %s: %s: %s", webhook.id, webhook.tenant, type(error).__name__, error)

    async def _deliver(self, webhook: WebhookRecord) -> None:
        for entry in await self.webhooks.pending(webhook.tenant, webhook.id, AT_A_TIME):
            if entry.action in webhook.events and not await self._told(webhook, entry):
                return
            if not await self.webhooks.lease(webhook.tenant, self.holder, LEASE_S):
                return
            await self.webhooks.advance(webhook.tenant, webhook.id, entry.id)

    async def _told(self, webhook: WebhookRecord, entry: AuditEntry) -> bool:
        """Whether to go on to the next event."""
        waiting, tries, not_before = self._waits.get(webhook.id, ("", 0, self.now()))
        if waiting != entry.id:
            tries, not_before = 0, self.now()
        if self.now() < not_before:
            return False
        tries += 1
        status, error = await self._post(webhook, entry)
        ok = status is not None and 200 <= status < 300
        self.note(ok)
        delivery = Delivery(at=self.now(), event=entry.id, ok=ok, tries=tries, status=status, error=error)
        await self.webhooks.note(webhook.tenant, webhook.id, delivery)
        if ok:
            self._waits.pop(webhook.id, None)
            return True
        if self.now() - entry.at > timedelta(seconds=GIVEN_UP_S):
            log.warning("webhook %s of %s: event %s was given up", webhook.id, webhook.tenant, entry.id)
            return True
        pause_s = min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S)
        self._waits[webhook.id] = (entry.id, tries, self.now() + timedelta(seconds=pause_s))
        return False

    async def _post(self, webhook: WebhookRecord, entry: AuditEntry) -> tuple[int | None, str]:
        body = json.dumps(payload(webhook.tenant, entry))
        id_, now = f"msg_{webhook.id}_{entry.id}", self.now()  # the same for every try: who has seen it can tell
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Slipstream-Webhooks",
            "webhook-id": id_,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(webhook.secret.get_secret_value()).sign(id_, now, body),
        }
        try:
            async with asyncio.timeout(TIMEOUT_S):
                url, more, extensions = await self._pinned(webhook.url)
                async with (
                    httpx.AsyncClient(
                        transport=self.transport, verify=self._tls, trust_env=False, follow_redirects=False
                    ) as client,
                    client.stream("POST", url, content=body, headers=headers | more, extensions=extensions) as answer,
                ):
                    return answer.status_code, ""  # its body may be of any length, and says nothing to us
        except _Refused as error:
            return None, str(error)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError, ValueError) as error:
            return None, f"{type(error).__name__}: no answer"

    async def _pinned(self, url: str) -> tuple[str, dict[str, str], dict[str, Any]]:
        """The URL with the host's address in it, checked: asked again, a name could mean another one."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = await self.resolve(host, port)
        if host not in self.private and not all(map(_is_public, addresses)):
            raise _Refused("the host is inside this server's network, which is not called")
        address = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
        pinned = parts._replace(netloc=f"{address}:{port}").geturl()
        return pinned, {"Host": parts.netloc}, {"sni_hostname": host}


def payload(tenant: str, entry: AuditEntry) -> dict[str, Any]:
    """What a webhook is told of an event."""
    name, _, tag = entry.subject.partition("@")
    data: dict[str, Any] = {"tenant": tenant, "adapter": name, "ref": entry.subject, "by": entry.by}
    if entry.action is AuditAction.ALIAS_MOVED:
        data |= {"alias": tag, "change": entry.detail}
    else:
        data |= {"version": int(tag), "digest": entry.detail}
    return {"type": entry.action.value, "timestamp": entry.at.isoformat(), "data": data}


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return _is_public(str(found.ipv4_mapped))
        # Others that hold an IPv4 address, which a gateway of the network may lead to: 6to4, Teredo, NAT64, `::10.0.0.1`.
        if found.sixtofour or found.teredo or any(found in network for network in _TRANSLATED):
            return False
    return found.is_global and not found.is_multicast


def _bad_url(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_value", param="url")
