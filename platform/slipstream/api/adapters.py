"""/v1/adapters: publish, look at and remove a tenant's adapters, their versions and aliases."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from adapter_registry.errors import NotPublished
from adapter_registry.keys import Role
from adapter_registry.records import (
    Access,
    AdapterDraft,
    AdapterSummary,
    AdapterVersion,
    Labels,
    SpeculationPolicy,
    check_name,
)
from slipstream.api.auth import CallerDep
from slipstream.api.caller import Caller
from slipstream.api.connection import while_connected
from slipstream.api.downloads import send_file
from slipstream.api.runtime import Runtime, RuntimeDep
from slipstream.api.sse import Json
from slipstream.api.uploads import receive_upload
from slipstream.api.wishes import smoke_of, wish_of
from slipstream.errors import AdapterRejected, Conflict, InvalidRequest
from slipstream.importing.archives import unpacked
from slipstream.importing.smoke import smoke_test
from slipstream.metrics.gateway import Publish
from slipstream.publishing import publish_folder, run_to_end

router = APIRouter(tags=["Adapters"])
VersionNumber = Annotated[int, Path(ge=1, le=10**9)]
_UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "files"],
                    "properties": {
                        "name": {"type": "string", "description": "The adapter's name."},
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "The files of the adapter's folder, each under its own name; or one .zip, .tar "
                            "or .tar.gz of it.",
                        },
                        "base": {
                            "type": "string",
                            "description": "The base model it is for; needed where several are served.",
                        },
                        "speculation": {
                            "type": "string",
                            "enum": ["on", "off"],
                            "description": "Whether requests with speculation `auto` draft. A new version's only.",
                        },
                        "speculation_reason": {"type": "string", "maxLength": 500, "description": "Why."},
                        "labels": {"type": "string", "description": 'A JSON object: {"team": "search"}.'},
                        "smoke": {
                            "type": "string",
                            "description": "A JSON list of prompts that it must answer before it is published: "
                            '[{"prompt": "2 + 2 =", "expect": "4", "max_tokens": 8}].',
                        },
                        "lineage": {
                            "type": "string",
                            "description": "A JSON object of what is known of: training_job, parent, data_sha256, source, "
                            "evaluation.",
                        },
                    },
                }
            }
        },
    }
}


class NewAccess(BaseModel):
    """The body of PUT …/access."""

    model_config = ConfigDict(extra="forbid", strict=True)

    public: bool = False
    tenants: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=100)] = []


class SpeculationSetting(SpeculationPolicy):
    """The body of PUT …/speculation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    enabled: bool


class NewLabels(BaseModel):
    """The body of PUT …/labels."""

    model_config = ConfigDict(extra="forbid", strict=True)

    labels: Labels


@router.post("/v1/adapters", status_code=201, openapi_extra=_UPLOAD_FORM)
async def publish(request: Request, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Publish an adapter: 201 with its new version, or 200 with the one that has the same content already."""
    tenant = caller.acting_tenant(Role.PUBLISHER)
    services = runtime.services
    async with receive_upload(request, services.upload_dir) as upload:
        name = check_name(upload.fields["name"])
        refuse_base_name(runtime, name)
        wish, smoke = wish_of(upload.fields), smoke_of(upload.fields)
        base = await runtime.catalog.base(upload.fields.get("base"))
        folder = await run_to_end(lambda: unpacked(upload.folder, services.max_upload_bytes))

        async def check(draft: AdapterDraft) -> None:
            await smoke_test(base.engine, base.spec, draft, smoke)

        publishing = publish_folder(
            folder,
            name,
            tenant,
            base.spec,
            store=services.store,
            blobs=services.blobs,
            created_by=caller.key_id,
            wish=wish,
            check=check,
        )
        version, is_new = await while_connected(request.receive, _counted(runtime, publishing))
    return JSONResponse(version_body(version), 201 if is_new else 200)


async def _counted(
    runtime: Runtime, publishing: Coroutine[Any, Any, tuple[AdapterVersion, bool]]
) -> tuple[AdapterVersion, bool]:
    try:
        version, is_new = await publishing
    except AdapterRejected:
        runtime.metrics.published(Publish.REJECTED)
        raise
    except Exception:
        runtime.metrics.published(Publish.FAILED)
        raise
    runtime.metrics.published(Publish.NEW if is_new else Publish.EXISTING)
    return version, is_new


@router.get("/v1/adapters")
async def list_adapters(
    caller: CallerDep,
    runtime: RuntimeDep,
    label: Annotated[
        list[str] | None, Query(max_length=32, description="`key=value`; all must hold of a version.")
    ] = None,
) -> Json:
    """The tenant's adapters; with `label`, those that have a version with it."""
    wanted = [_label(text) for text in label or []]
    summaries = await runtime.services.store.list(caller.acting_tenant())
    data = [
        _summary_body(summary, caller)
        for summary in summaries
        if caller.may_call(summary.name)
        and (not wanted or any(all(v.labels.get(k) == value for k, value in wanted) for v in summary.versions))
    ]
    return {"object": "list", "data": data}


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """One adapter, its versions (newest first) and its aliases."""
    return _summary_body(await visible(runtime, caller, name), caller)


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Remove an adapter with all its versions and aliases. Requests that run already go on to their end."""
    return await _delete(runtime, caller, check_name(name), None)


@router.get("/v1/adapters/{name}/versions/{version}")
async def get_version(name: str, version: VersionNumber, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """One version."""
    return version_body(_pick(await visible(runtime, caller, name), version))


@router.delete("/v1/adapters/{name}/versions/{version}")
async def delete_version(name: str, version: VersionNumber, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Remove one version; 409 while an alias points at it."""
    return await _delete(runtime, caller, check_name(name), version)


@router.put("/v1/adapters/{name}/versions/{version}/speculation")
async def set_speculation(
    name: str, version: VersionNumber, body: SpeculationSetting, caller: CallerDep, runtime: RuntimeDep
) -> Json:
    """Say whether requests with speculation `auto` draft, and why. It holds for the next request; weights stay."""
    tenant, policy = caller.acting_tenant(Role.PUBLISHER), SpeculationPolicy(enabled=body.enabled, reason=body.reason)
    try:
        changed = await runtime.services.store.set_speculation(tenant, check_name(name), version, policy)
    except NotPublished:
        raise no_version(name, version) from None
    return version_body(changed)


@router.put("/v1/adapters/{name}/versions/{version}/labels")
async def set_labels(
    name: str, version: VersionNumber, body: NewLabels, caller: CallerDep, runtime: RuntimeDep
) -> Json:
    """Replace a version's labels."""
    tenant = caller.acting_tenant(Role.PUBLISHER)
    try:
        changed = await runtime.services.store.set_labels(tenant, check_name(name), version, body.labels)
    except NotPublished:
        raise no_version(name, version) from None
    return version_body(changed)


@router.get("/v1/adapters/{name}/versions/{version}/files")
async def list_files(name: str, version: VersionNumber, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """A version's files: those that make its digest, then what came with them (cards, curves, logs)."""
    found = await _version(runtime, caller.acting_tenant(Role.PUBLISHER), name, version)
    files = [{**entry.model_dump(), "attachment": False} for entry in found.files]
    attachments = [{**entry.model_dump(), "attachment": True} for entry in found.attachments]
    return {"object": "list", "data": files + attachments}


@router.get("/v1/adapters/{name}/versions/{version}/files/{path}", response_class=StreamingResponse)
async def get_file(name: str, version: VersionNumber, path: str, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """One file's content."""
    tenant = caller.acting_tenant(Role.PUBLISHER)
    found = await _version(runtime, tenant, name, version)
    entry = next((each for each in (*found.files, *found.attachments) if each.path == path), None)
    if entry is None:
        raise NotPublished(f"'{found.ref}' has no file '{path[:80]}'. GET …/versions/{version}/files lists them.")
    return await send_file(runtime.services, tenant, name=entry.path, sha256=entry.sha256, size=entry.size)


@router.put("/v1/adapters/{name}/access")
async def set_access(name: str, body: NewAccess, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Say who else may call this adapter, as `tenant/name`; all of it, so what is left out is taken back."""
    tenant = caller.acting_tenant(Role.PUBLISHER)
    access = Access(public=body.public, tenants=tuple(sorted({check_name(other, "tenant") for other in body.tenants})))
    await runtime.services.store.set_access(tenant, check_name(name), access, caller.key_id)
    runtime.catalog.forget(tenant, name)
    return {"object": "adapter.access", "name": name, **access.model_dump(mode="json")}


def refuse_base_name(runtime: Runtime, name: str) -> None:
    """Raise `Conflict` for a name that means a base model."""
    if runtime.catalog.base_of(name) is not None:
        raise Conflict(f"'{name}' is the base model's own name; requests for it would never reach an adapter.")


async def _delete(runtime: RuntimeDep, caller: Caller, name: str, version: int | None) -> Json:
    tenant = caller.acting_tenant(Role.PUBLISHER)
    removed = await runtime.services.store.delete(tenant, name, version, caller.key_id)
    runtime.catalog.forget(tenant, name)
    return {"object": "adapter.deleted", "name": name, "deleted": True, "versions": [gone.version for gone in removed]}


async def visible(runtime: RuntimeDep, caller: Caller, name: str) -> AdapterSummary:
    """An adapter that the key is for."""
    tenant = caller.acting_tenant()
    if not caller.may_call(check_name(name)):
        raise NotPublished(f"Nothing is published as {name!r} under this name, version or alias.")
    return await runtime.services.store.get(tenant, name)


def _pick(summary: AdapterSummary, version: int) -> AdapterVersion:
    found = next((each for each in summary.versions if each.version == version), None)
    if found is None:
        raise no_version(summary.name, version)
    return found


async def _version(runtime: RuntimeDep, tenant: str, name: str, version: int) -> AdapterVersion:
    return _pick(await runtime.services.store.get(tenant, check_name(name)), version)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InvalidRequest("'label' is written as key=value.", code="invalid_value", param="label")
    return key, value


def no_version(name: str, version: int) -> NotPublished:
    """The refusal of a version that is not there."""
    return NotPublished(f"There is no version {version} of '{name}'.")


def version_body(version: AdapterVersion) -> Json:
    return {
        "object": "adapter.version",
        "ref": version.ref,
        "digest": version.digest,
        "size_bytes": version.size_bytes,
        **version.model_dump(mode="json"),
    }


def _summary_body(summary: AdapterSummary, caller: Caller) -> Json:
    current = summary.current
    return {
        "object": "adapter",
        "tenant": summary.tenant,
        "name": summary.name,
        "current": current.version if current else None,
        "aliases": summary.aliases,
        "splits": {alias: split.model_dump() for alias, split in summary.splits.items()},
        "guards": {alias: guard.model_dump() for alias, guard in summary.guards.items()},
        # Who else may call it is for those who may change that.
        "access": summary.access.model_dump(mode="json") if caller.role.includes(Role.PUBLISHER) else None,
        "versions": [version_body(version) for version in summary.versions],
    }
