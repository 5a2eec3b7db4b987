"""Webhooks: who is told of what happens to a tenant's versions and aliases. Records, and the seam `WebhookStore`.

Real twin: `adapter_registry.redis_webhooks.RedisWebhooks`. Public fake: `slipstream.testing.MemoryWebhooks`. Both run the
same suite in `tests/contract`.

What there is to tell is in the tenant's audit log, written by the very step that did it; a webhook has a place in that log.
So nothing is lost when a gateway dies between doing and telling, and there is no second record of what happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Protocol

from pydantic import Field, SecretStr, StringConstraints, field_serializer

from adapter_registry.errors import InUse, NotPublished
from adapter_registry.records import AuditAction, AuditEntry, Frozen, Name

WEBHOOK_PREFIX = "wh-"
MAX_WEBHOOKS = 20  # of a tenant
EVENTS = (AuditAction.VERSION_PUBLISHED, AuditAction.VERSION_DELETED, AuditAction.ALIAS_MOVED)


class WebhookRecord(Frozen):
    """One address, and what it is told."""

    id: Annotated[str, StringConstraints(pattern=r"^wh-[0-9a-f]{24}$")]
    tenant: Name
    url: Annotated[str, Field(max_length=1000)]
    events: tuple[AuditAction, ...] = EVENTS
    secret: SecretStr  # `whsec_…`; deliveries are signed with it, so it is kept as it is
    created_by: str = ""  # key id
    created_at: datetime

    @field_serializer("secret", when_used="json")
    def _as_it_is(self, secret: SecretStr) -> str:
        return secret.get_secret_value()


class Delivery(Frozen):
    """How it went last."""

    at: datetime
    event: str  # id of the audit entry
    ok: bool
    tries: int = 1  # of this event
    status: int | None = None  # None: no answer came
    error: str = ""


class WebhookStore(Protocol):
    """Webhooks, and how far each has come in its tenant's audit log. Others' look like unknown ones: `NotPublished`."""

    async def add(self, webhook: WebhookRecord) -> None:
        """Keep a new one; it is told of what happens from now on. Raises `InUse` when a tenant has `MAX_WEBHOOKS`."""
        ...

    async def list(self, tenant: str) -> Sequence[WebhookRecord]:
        """Oldest first."""
        ...

    async def delete(self, tenant: str, webhook_id: str) -> None:
        """Raises `NotPublished`."""
        ...

    async def tenants(self) -> Sequence[str]:
        """Those that have webhooks, and perhaps some that had."""
        ...

    async def lease(self, tenant: str, holder: str, seconds: float) -> bool:
        """Whether `holder` may deliver a tenant's events for so long, now or still."""
        ...

    async def pending(self, tenant: str, webhook_id: str, limit: int) -> Sequence[AuditEntry]:
        """What it has not been told yet, oldest first."""
        ...

    async def advance(self, tenant: str, webhook_id: str, entry_id: str) -> None:
        """It has been told of everything up to this entry."""
        ...

    async def note(self, tenant: str, webhook_id: str, delivery: Delivery) -> None:
        """Keep how it went last; unknown ones are not noted."""
        ...

    async def last(self, tenant: str, webhook_id: str) -> Delivery | None:
        """How it went last, if it has been tried."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


def no_webhook(webhook_id: str) -> NotPublished:
    """The same for unknown ones and other tenants'."""
    return NotPublished(f"There is no webhook {webhook_id[:80]!r}: GET /v1/webhooks lists yours.")


def too_many_webhooks() -> InUse:
    """The refusal of one more."""
    return InUse(f"A tenant has {MAX_WEBHOOKS} webhooks at most. Delete one first.")
