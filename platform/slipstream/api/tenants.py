"""/v1/tenants: what each tenant may use, and its share of busy engines. /v1/usage: what it has used."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from adapter_registry.limits import Limit, Quota
from adapter_registry.records import check_name, utc_now
from adapter_registry.tenants import TenantRecord, UsageCounts, UsageRow
from slipstream.api.auth import CallerDep
from slipstream.api.runtime import RuntimeDep
from slipstream.api.sse import Json
from slipstream.errors import Forbidden, InvalidRequest

router = APIRouter(tags=["Tenants"])
DEFAULT_DAYS = 30
MOST_DAYS = 400  # usage is kept for as long
FIRST_YEAR = 2000  # dates before are typing errors


class NewQuota(BaseModel):
    """What a tenant may use; what is left out or null is not limited."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    tokens_per_month: Limit | None = None
    storage_bytes: Limit | None = None


class TenantSettings(BaseModel):
    """The body of PUT /v1/tenants/{tenant}: all of its settings, so what is left out is reset."""

    model_config = ConfigDict(extra="forbid", strict=True)

    quota: NewQuota = NewQuota()
    weight: Annotated[float, Field(gt=0, le=1000, strict=False)] = 1.0
    log_prompts: bool = Field(False, description="Whether its prompts and answers go into logs and traces.")


@router.put("/v1/tenants/{tenant}")
async def put_tenant(tenant: str, body: TenantSettings, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Set a tenant's quota, its weight and whether its prompts are logged: from its next request on, at every gateway."""
    caller.require_admin()
    record = TenantRecord(
        tenant=check_name(tenant, "tenant"),
        quota=Quota(**body.quota.model_dump()),
        weight=body.weight,
        log_prompts=body.log_prompts,
    )
    await runtime.services.tenants.put_tenant(record, caller.key_id)
    return _body(record)


@router.get("/v1/tenants")
async def list_tenants(caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Every tenant that has a key, an adapter or settings."""
    caller.require_admin()
    names = await runtime.services.store.tenants()
    found = await asyncio.gather(*map(runtime.services.tenants.get_tenant, names))
    return {"object": "list", "data": [_body(record) for record in found]}


@router.get("/v1/tenants/{tenant}")
async def get_tenant(tenant: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """One tenant's settings: for the admin, and for the tenant itself."""
    if not caller.is_admin and caller.tenant != tenant:
        raise Forbidden("This key may not see other tenants.")
    return _body(await runtime.services.tenants.get_tenant(check_name(tenant, "tenant")))


@router.get("/v1/usage", response_model=None)
async def usage(
    caller: CallerDep,
    runtime: RuntimeDep,
    start: Annotated[date | None, Query(description="First day, in UTC; 30 days before the last if left out.")] = None,
    end: Annotated[date | None, Query(description="Last day, in UTC; today if left out.")] = None,
    format: Annotated[Literal["json", "csv"], Query()] = "json",
) -> Response:
    """What the tenant has used, by day and model: requests, and tokens of prompts, answers and drafts."""
    last = end or utc_now().date()
    if last.year < FIRST_YEAR:
        raise InvalidRequest(f"'end' is before {FIRST_YEAR}.", code="invalid_value", param="end")
    first = start or last - timedelta(days=DEFAULT_DAYS - 1)
    if not timedelta(0) <= last - first < timedelta(days=MOST_DAYS):
        raise InvalidRequest(
            f"'start' must be before 'end', by fewer than {MOST_DAYS} days.", code="invalid_value", param="start"
        )
    rows = await runtime.services.tenants.usage(caller.acting_tenant(), first, last)
    rows = [row for row in rows if caller.may_call(row.model.partition("@")[0])]
    if format == "csv":
        return PlainTextResponse(_csv(rows), media_type="text/csv")
    total = UsageCounts()
    for row in rows:
        total = total.plus(row.counts)
    data = [{"day": row.day.isoformat(), "model": row.model, **row.counts.model_dump()} for row in rows]
    body = {"object": "list", "start": first.isoformat(), "end": last.isoformat(), "data": data}
    return JSONResponse({**body, "total": total.model_dump()})


def _csv(rows: Sequence[UsageRow]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["day", "model", *UsageCounts.model_fields])
    lines.writerows([row.day, row.model, *row.counts.model_dump().values()] for row in rows)
    return text.getvalue()


def _body(record: TenantRecord) -> Json:
    return {"object": "tenant", **record.model_dump(mode="json")}
