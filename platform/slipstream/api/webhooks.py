"""/v1/webhooks: addresses that are told of what happens to a tenant's versions and aliases."""

from __future__ import annotations

import base64
import secrets
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from adapter_registry.jobs import new_id
from adapter_registry.keys import Role
from adapter_registry.records import AuditAction, utc_now
from adapter_registry.webhooks import EVENTS, WEBHOOK_PREFIX, WebhookRecord
from slipstream.api.auth import CallerDep
from slipstream.api.runtime import RuntimeDep
from slipstream.api.sse import Json
from slipstream.errors import InvalidRequest
from slipstream.webhooks import check_url

router = APIRouter(tags=["Webhooks"])


class NewWebhook(BaseModel):
    """The body of POST /v1/webhooks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[str, Field(max_length=1000)]
    events: Annotated[list[Annotated[AuditAction, Field(strict=False)]], Field(min_length=1, max_length=10)] | None = (
        None
    )


@router.post("/v1/webhooks", status_code=201)
async def create(body: NewWebhook, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Have an address told. The secret that deliveries are signed with is in this answer only."""
    tenant, services = caller.acting_tenant(Role.ADMIN), runtime.services
    check_url(body.url, services.webhook_private_hosts)
    events = tuple(body.events or EVENTS)
    if wrong := next((event for event in events if event not in EVENTS), None):
        known = ", ".join(EVENTS)
        raise InvalidRequest(
            f"No webhook is told of '{wrong}': choose of {known}.", code="invalid_value", param="events"
        )
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    webhook = WebhookRecord(
        id=new_id(WEBHOOK_PREFIX),
        tenant=tenant,
        url=body.url,
        events=events,
        secret=SecretStr(secret),
        created_by=caller.key_id,
        created_at=utc_now(),
    )
    await services.webhooks.add(webhook)
    return {**_body(webhook), "secret": secret}


@router.get("/v1/webhooks")
async def list_webhooks(caller: CallerDep, runtime: RuntimeDep) -> Json:
    """The tenant's webhooks, and how the last delivery to each went."""
    tenant, store = caller.acting_tenant(Role.ADMIN), runtime.services.webhooks
    found = [(webhook, await store.last(tenant, webhook.id)) for webhook in await store.list(tenant)]
    data = [
        {**_body(webhook), "last_delivery": None if last is None else last.model_dump(mode="json")}
        for webhook, last in found
    ]
    return {"object": "list", "data": data}


@router.delete("/v1/webhooks/{webhook_id}", status_code=204)
async def delete(webhook_id: str, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Tell it nothing more."""
    await runtime.services.webhooks.delete(caller.acting_tenant(Role.ADMIN), webhook_id)
    return Response(status_code=204)


def _body(webhook: WebhookRecord) -> Json:
    return {
        "id": webhook.id,
        "object": "webhook",
        "url": webhook.url,
        "events": list(webhook.events),
        "created_at": webhook.created_at.isoformat(),
    }
