"""`MemoryWebhooks`: the registry's `WebhookStore` without Redis. It passes the same contract tests as `RedisWebhooks`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from adapter_registry.records import AuditEntry
from adapter_registry.webhooks import (
    MAX_WEBHOOKS,
    Delivery,
    WebhookRecord,
    WebhookStore,
    no_webhook,
    too_many_webhooks,
)
from slipstream.testing.memory_store import MemoryStore

_Key = tuple[str, str]  # tenant, id


class MemoryWebhooks(WebhookStore):
    """Records in dictionaries; what there is to tell is `store`'s audit log."""

    def __init__(self, store: MemoryStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._webhooks: dict[_Key, WebhookRecord] = {}
        self._told: dict[_Key, int] = {}  # how many entries there were, and have been told of
        self._last: dict[_Key, Delivery] = {}
        self._leases: dict[str, tuple[str, float]] = {}

    async def add(self, webhook: WebhookRecord) -> None:
        """Keep a new one. Raises `InUse` when a tenant has `MAX_WEBHOOKS`."""
        key = (webhook.tenant, webhook.id)
        if key in self._webhooks:
            return
        if len(await self.list(webhook.tenant)) >= MAX_WEBHOOKS:
            raise too_many_webhooks()
        self._webhooks[key] = webhook
        self._told[key] = len(self._store.enter(webhook.tenant).audit)

    async def list(self, tenant: str) -> Sequence[WebhookRecord]:
        """Oldest first."""
        return [webhook for (owner, _), webhook in self._webhooks.items() if owner == tenant]

    async def delete(self, tenant: str, webhook_id: str) -> None:
        """Raises `NotPublished`."""
        if self._webhooks.pop((tenant, webhook_id), None) is None:
            raise no_webhook(webhook_id)
        self._last.pop((tenant, webhook_id), None)

    async def tenants(self) -> Sequence[str]:
        """Those that have webhooks."""
        return sorted({tenant for tenant, _ in self._webhooks})

    async def lease(self, tenant: str, holder: str, seconds: float) -> bool:
        """Whether `holder` may deliver a tenant's events for so long, now or still."""
        other, until = self._leases.get(tenant, (holder, 0.0))
        if other != holder and until > self._clock():
            return False
        self._leases[tenant] = (holder, self._clock() + seconds)
        return True

    async def pending(self, tenant: str, webhook_id: str, limit: int) -> Sequence[AuditEntry]:
        """What it has not been told yet, oldest first."""
        if (tenant, webhook_id) not in self._webhooks:
            return []
        oldest_first = list(self._store.enter(tenant).audit)[::-1]
        return oldest_first[self._told[tenant, webhook_id] :][:limit]

    async def advance(self, tenant: str, webhook_id: str, entry_id: str) -> None:
        """It has been told of everything up to this entry."""
        if (tenant, webhook_id) not in self._webhooks:
            return
        ids = [entry.id for entry in self._store.enter(tenant).audit][::-1]
        self._told[tenant, webhook_id] = ids.index(entry_id) + 1

    async def note(self, tenant: str, webhook_id: str, delivery: Delivery) -> None:
        """Keep how it went last; unknown ones are not noted."""
        if (tenant, webhook_id) in self._webhooks:
            self._last[tenant, webhook_id] = delivery

    async def last(self, tenant: str, webhook_id: str) -> Delivery | None:
        """How it went last, if it has been tried."""
        return self._last.get((tenant, webhook_id))

    async def close(self) -> None:
        """Nothing to give back."""
