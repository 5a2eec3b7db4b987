"""/v1/keys: the platform's admin gives tenants their keys and takes them back; a tenant's admin does so for its own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from adapter_registry.errors import NotPublished
from adapter_registry.keys import KeyRecord, Role, UserName, UserRecord, new_key
from adapter_registry.records import parse_reference, utc_now
from slipstream.api.auth import CallerDep
from slipstream.api.caller import Caller
from slipstream.api.runtime import Runtime, RuntimeDep
from slipstream.api.sse import Json
from slipstream.errors import Conflict, InvalidRequest

router = APIRouter(tags=["Keys"])
UserPath = Annotated[UserName, Path(description="A name or an e-mail address.")]
TenantQuery = Annotated[
    str | None, Query(max_length=64, description="Whose keys; a tenant's admin may leave its own out.")
]
MOST_GRACE_S = 30 * 86_400


class NewKey(BaseModel):
    """The body of POST /v1/keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tenant: Annotated[str, Field(max_length=64)] | None = None
    label: Annotated[str, Field(max_length=200)] = ""
    role: Annotated[Role, Field(strict=False)] | None = None  # publisher; with `models` caller
    models: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1, max_length=100)] | None = None
    expires_at: Annotated[AwareDatetime, Field(strict=False)] | None = None
    user: UserName | None = None  # whose it is; it may no more than the user


class NewUser(BaseModel):
    """The body of PUT /v1/users/{user}."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Annotated[Role, Field(strict=False)]


class Rotation(BaseModel):
    """The body of POST /v1/keys/{id}/rotate."""

    model_config = ConfigDict(extra="forbid", strict=True)

    grace_s: Annotated[int, Field(ge=0, le=MOST_GRACE_S)] = 3600


@router.post("/v1/keys", status_code=201)
async def create_key(body: NewKey, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Make a key. Its secret is in this answer and nowhere else: only a hash is kept."""
    tenant = caller.managed_tenant(body.tenant)
    if body.expires_at is not None and body.expires_at <= utc_now():
        raise InvalidRequest("'expires_at' is in the past.", code="invalid_value", param="expires_at")
    models = None
    if body.models is not None:
        if body.role not in (None, Role.CALLER):
            raise InvalidRequest(
                f"A key for some models only calls them: 'models' goes with the role 'caller', not '{body.role}'.",
                code="invalid_value",
                param="role",
            )
        models = tuple(_label(runtime, tenant, model) for model in body.models)
    role = body.role or (Role.PUBLISHER if models is None else Role.CALLER)
    return await _made(runtime, caller, new_key(tenant, body.label, role, models, body.expires_at, body.user))


@router.get("/v1/keys")
async def list_keys(caller: CallerDep, runtime: RuntimeDep, tenant: TenantQuery = None) -> Json:
    """A tenant's keys, without their secrets, and when they were last used."""
    store, owner = runtime.services.store, caller.managed_tenant(tenant)
    keys, uses = await store.list_keys(owner), await store.key_uses(owner)
    return {"object": "list", "data": [_key_body(key, uses.get(key.id)) for key in keys]}


@router.post("/v1/keys/{key_id}/rotate", status_code=201)
async def rotate_key(
    key_id: str, body: Rotation, caller: CallerDep, runtime: RuntimeDep, tenant: TenantQuery = None
) -> Json:
    """Make a key that may what this one may; this one goes on working for `grace_s`, so that clients can change over."""
    store, owner, now = runtime.services.store, caller.managed_tenant(tenant), utc_now()
    old = _find(await store.list_keys(owner), key_id)
    if old.is_expired(now):
        raise InvalidRequest("This key has expired: make a new one.", code="expired_api_key", param="key_id")
    if old.replaced_by is not None:
        raise Conflict(
            f"This key was rotated already: rotate its heir {old.replaced_by}, or revoke that and make a new one."
        )
    made = await _made(runtime, caller, new_key(owner, old.label, old.role, old.models, old.expires_at, old.user))
    ends = now + timedelta(seconds=body.grace_s)
    changes = {"expires_at": min(ends, old.expires_at or ends), "replaced_by": made["id"]}
    await store.replace_key(old.model_copy(update=changes), caller.key_id)
    runtime.keys.forget(lambda record: record.id == key_id)
    return made


@router.delete("/v1/keys/{key_id}", status_code=204)
async def delete_key(key_id: str, caller: CallerDep, runtime: RuntimeDep, tenant: TenantQuery = None) -> Response:
    """Revoke a key: at once here, within seconds at other gateways."""
    await runtime.services.store.delete_key(caller.managed_tenant(tenant), key_id, caller.key_id)
    runtime.keys.forget(lambda record: record.id == key_id)
    return Response(status_code=204)


def _label(runtime: Runtime, tenant: str, model: str) -> str:
    """A model as keys name it: a base by its full id, an adapter without its version, another tenant's with its owner."""
    base = runtime.catalog.base_of(model)
    if base is not None:
        return base
    selector = parse_reference(model)
    if selector.by != "default":
        raise InvalidRequest(
            f"'{model[:200]}' names a version: a key is for an adapter, so leave out what comes after '@'.",
            code="invalid_value",
            param="models",
        )
    return selector.name if selector.tenant in (None, tenant) else f"{selector.tenant}/{selector.name}"


async def _made(runtime: Runtime, caller: Caller, made: tuple[str, KeyRecord]) -> Json:
    secret, record = made
    await runtime.services.store.put_key(record, caller.key_id)
    return {**_key_body(record, None), "secret": secret}


def _find(keys: Sequence[KeyRecord], key_id: str) -> KeyRecord:
    found = next((key for key in keys if key.id == key_id), None)
    if found is None:
        raise NotPublished(f"There is no key {key_id[:80]!r}: list the keys to see their ids.")
    return found


def _key_body(record: KeyRecord, used_at: datetime | None) -> Json:
    used = used_at.isoformat() if used_at is not None else None
    return {"object": "key", **record.model_dump(mode="json", exclude={"sha256"}), "last_used_at": used}


@router.put("/v1/users/{user}")
async def put_user(
    user: UserPath, body: NewUser, caller: CallerDep, runtime: RuntimeDep, tenant: TenantQuery = None
) -> Json:
    """Make a user, or change what its keys may at most: those that may more are lowered, within seconds everywhere."""
    store, owner = runtime.services.store, caller.managed_tenant(tenant)
    known = {each.name: each for each in await store.list_users(owner)}
    since = known[user].created_at if user in known else utc_now()
    record = UserRecord(tenant=owner, name=user, role=body.role, created_at=since)
    await store.put_user(record, caller.key_id)
    runtime.keys.forget(lambda key: key.tenant == owner and key.user == user)
    return _user_body(record)


@router.get("/v1/users")
async def list_users(caller: CallerDep, runtime: RuntimeDep, tenant: TenantQuery = None) -> Json:
    """A tenant's users."""
    found = await runtime.services.store.list_users(caller.managed_tenant(tenant))
    return {"object": "list", "data": [_user_body(user) for user in found]}


@router.delete("/v1/users/{user}")
async def delete_user(user: UserPath, caller: CallerDep, runtime: RuntimeDep, tenant: TenantQuery = None) -> Json:
    """Remove a user and revoke all its keys: at once here, within seconds at other gateways."""
    owner = caller.managed_tenant(tenant)
    revoked = await runtime.services.store.delete_user(owner, user, caller.key_id)
    runtime.keys.forget(lambda key: key.tenant == owner and key.user == user)
    return {"object": "user.deleted", "name": user, "deleted": True, "keys": list(revoked)}


def _user_body(user: UserRecord) -> Json:
    return {"object": "user", **user.model_dump(mode="json")}


@router.get("/v1/audit")
async def audit_log(
    caller: CallerDep,
    runtime: RuntimeDep,
    tenant: TenantQuery = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[str | None, Query(max_length=40, description="An entry's id: only older ones.")] = None,
) -> Json:
    """Who published, deleted, moved, shared and made keys: newest first."""
    owner = caller.managed_tenant(tenant)
    entries = await runtime.services.store.audit_log(owner, limit, before)
    data = [{"object": "audit.entry", **entry.model_dump(mode="json")} for entry in entries]
    return {"object": "list", "data": data, "has_more": len(entries) == limit}
