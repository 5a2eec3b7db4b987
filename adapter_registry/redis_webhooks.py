"""`RedisWebhooks`: webhooks in Redis, beside the audit log that they follow."""

from __future__ import annotations

from collections.abc import Sequence

from adapter_registry.records import AuditEntry, check_name
from adapter_registry.redis_connection import RedisConnection
from adapter_registry.redis_store import audit_entry
from adapter_registry.scripts import PREFIX, TENANTS_KEY, TenantKeys
from adapter_registry.webhooks import (
    MAX_WEBHOOKS,
    Delivery,
    WebhookRecord,
    WebhookStore,
    no_webhook,
    too_many_webhooks,
)

WEBHOOK_SCRIPTS = ("webhook_add", "webhook_set", "lease")
HOOKED_KEY = PREFIX + "{webhooks}:tenants"  # set: tenants that have some, and perhaps some that had


class _Keys(TenantKeys):
    """A tenant's keys, with those of its webhooks."""

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        base = f"{PREFIX}{{{check_name(tenant, 'tenant')}}}:webhooks"
        self.webhooks = base  # hash: id -> record
        self.places = base + ":places"  # hash: id -> id of the last audit entry that it was told of
        self.deliveries = base + ":deliveries"  # hash: id -> how it went last
        self.lease = base + ":lease"  # who delivers


class RedisWebhooks(RedisConnection, WebhookStore):
    """Build it with `from_url`; one instance serves one event loop."""

    SCRIPTS = WEBHOOK_SCRIPTS

    async def add(self, webhook: WebhookRecord) -> None:
        """Keep a new one. Raises `InUse` when a tenant has `MAX_WEBHOOKS`."""
        keys = _Keys(webhook.tenant)
        # The index first: one that is missing there would never be told anything.
        await self._command("SADD", TENANTS_KEY, webhook.tenant)
        await self._command("SADD", HOOKED_KEY, webhook.tenant)
        args: list[str | int] = [webhook.id, webhook.model_dump_json(), MAX_WEBHOOKS]
        if not await self._script("webhook_add", [keys.webhooks, keys.places, keys.audit], args):
            raise too_many_webhooks()
        await self._command("SADD", HOOKED_KEY, webhook.tenant)  # it may have been dropped just before

    async def list(self, tenant: str) -> Sequence[WebhookRecord]:
        """Oldest first."""
        found = await self._command("HVALS", _Keys(tenant).webhooks)
        return sorted(map(WebhookRecord.model_validate_json, found), key=lambda each: (each.created_at, each.id))

    async def delete(self, tenant: str, webhook_id: str) -> None:
        """Raises `NotPublished`."""
        keys = _Keys(tenant)
        if not await self._command("HDEL", keys.webhooks, webhook_id):
            raise no_webhook(webhook_id)
        # Nobody reads these any more: no script for that.
        await self._command("HDEL", keys.places, webhook_id)
        await self._command("HDEL", keys.deliveries, webhook_id)

    async def tenants(self) -> Sequence[str]:
        """Those that have webhooks, and perhaps some that had."""
        found = sorted(await self._command("SMEMBERS", HOOKED_KEY))
        gone = [tenant for tenant in found if not await self._command("EXISTS", _Keys(tenant).webhooks)]
        if gone:
            await self._command("SREM", HOOKED_KEY, *gone)
        return [tenant for tenant in found if tenant not in gone]

    async def lease(self, tenant: str, holder: str, seconds: float) -> bool:
        """Whether `holder` may deliver a tenant's events for so long, now or still."""
        return bool(await self._script("lease", [_Keys(tenant).lease], [holder, round(seconds * 1000)]))

    async def pending(self, tenant: str, webhook_id: str, limit: int) -> Sequence[AuditEntry]:
        """What it has not been told yet, oldest first."""
        keys = _Keys(tenant)
        place = await self._command("HGET", keys.places, webhook_id)
        if place is None:
            return []
        found = await self._command("XRANGE", keys.audit, f"({place}", "+", "COUNT", str(limit))
        return [audit_entry(*each) for each in found]

    async def advance(self, tenant: str, webhook_id: str, entry_id: str) -> None:
        """It has been told of everything up to this entry."""
        keys = _Keys(tenant)
        await self._script("webhook_set", [keys.webhooks, keys.places], [webhook_id, entry_id])

    async def note(self, tenant: str, webhook_id: str, delivery: Delivery) -> None:
        """Keep how it went last; unknown ones are not noted."""
        keys = _Keys(tenant)
        await self._script("webhook_set", [keys.webhooks, keys.deliveries], [webhook_id, delivery.model_dump_json()])

    async def last(self, tenant: str, webhook_id: str) -> Delivery | None:
        """How it went last, if it has been tried."""
        found = await self._command("HGET", _Keys(tenant).deliveries, webhook_id)
        return Delivery.model_validate_json(found) if found else None
