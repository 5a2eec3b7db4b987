"""/v1/keys: the admin gives tenants their keys and takes them back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from adapter_registry.keys import new_key
from adapter_registry.records import KeyRecord, check_name
from slipstream.api.auth import CallerDep
from slipstream.api.runtime import RuntimeDep
from slipstream.api.sse import Json

router = APIRouter(tags=["Keys"])
TenantQuery = Annotated[str, Query(max_length=64, description="Whose keys.")]


class NewKey(BaseModel):
    """The body of POST /v1/keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tenant: Annotated[str, Field(max_length=64)]
    label: Annotated[str, Field(max_length=200)] = ""


@router.post("/v1/keys", status_code=201)
async def create_key(body: NewKey, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Make a key. Its secret is in this answer and nowhere else: only a hash is kept."""
    caller.require_admin()
    secret, record = new_key(check_name(body.tenant, "tenant"), body.label)
    await runtime.services.store.put_key(record)
    return {**_key_body(record), "secret": secret}


@router.get("/v1/keys")
async def list_keys(tenant: TenantQuery, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """A tenant's keys, without their secrets."""
    caller.require_admin()
    keys = await runtime.services.store.list_keys(check_name(tenant, "tenant"))
    return {"object": "list", "data": [_key_body(key) for key in keys]}


@router.delete("/v1/keys/{key_id}", status_code=204)
async def delete_key(key_id: str, tenant: TenantQuery, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Revoke a key: at once here, within seconds at other gateways."""
    caller.require_admin()
    await runtime.services.store.delete_key(check_name(tenant, "tenant"), key_id)
    runtime.keys.forget(lambda record: record.id == key_id)
    return Response(status_code=204)


def _key_body(record: KeyRecord) -> Json:
    return {"object": "key", **record.model_dump(mode="json", exclude={"sha256"})}
