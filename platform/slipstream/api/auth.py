"""Who is calling: the admin, or a tenant through one of its keys."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Header
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from adapter_registry.keys import hash_key
from adapter_registry.records import check_name, utc_now
from slipstream.api.caller import TENANT_HEADER, Caller
from slipstream.api.observing import note_tenant
from slipstream.api.runtime import Runtime, RuntimeDep
from slipstream.errors import Forbidden, Unauthorized

_bearer = HTTPBearer(auto_error=False, description="A tenant's key, or the admin key.")


async def _authenticate(
    runtime: RuntimeDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    acting_for: Annotated[str | None, Header(alias=TENANT_HEADER, max_length=64)] = None,
) -> Caller:
    if credentials is None or not credentials.credentials:
        raise Unauthorized(
            "No API key was sent. Send the header 'Authorization: Bearer <key>'.", code="missing_api_key"
        )
    caller = await _identify(runtime, hash_key(credentials.credentials))
    note_tenant(caller.tenant)
    if acting_for is None:
        return caller
    check_name(acting_for, "tenant")
    if caller.is_admin:
        note_tenant(acting_for)
        return Caller(acting_for, caller.key_id, is_admin=True)
    if caller.tenant != acting_for:
        raise Forbidden(f"This key may not act for another tenant. Leave the header '{TENANT_HEADER}' out.")
    return caller


async def _identify(runtime: Runtime, sha256: str) -> Caller:
    # Hashes are compared, so the admin key's length stays unknown; constant-time, so its hash does too.
    if hmac.compare_digest(sha256, runtime.services.admin_key_sha256):
        return Caller(None, "admin", is_admin=True)
    record = await runtime.keys.ask(sha256, lambda: runtime.services.store.find_key(sha256))
    if record is None:
        raise Unauthorized("This API key is unknown or has been revoked.")
    if record.is_expired(utc_now()):
        raise Unauthorized("This API key has expired.", code="expired_api_key")
    runtime.key_uses.note(record)
    return Caller(record.tenant, record.id, is_admin=False, role=record.role, models=record.models)


CallerDep = Annotated[Caller, Depends(_authenticate)]
