"""/v1/adapters/{name}/aliases: where names lead, and rollouts: splits, shadows, guards, rollbacks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from adapter_registry.errors import NotPublished
from adapter_registry.keys import Role
from adapter_registry.records import AdapterSummary, Guard, Split, check_alias, check_name
from slipstream.api.adapters import no_version, visible
from slipstream.api.auth import CallerDep
from slipstream.api.runtime import RuntimeDep
from slipstream.api.sse import Json
from slipstream.errors import InvalidRequest

router = APIRouter(tags=["Aliases"])


class NewSplit(BaseModel):
    """A part of an alias's requests that another version answers; the same `user` stays on one side."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=1, le=10**9)]
    weight: Annotated[float, Field(ge=0.0001, le=0.9999, strict=False)]
    shadow: bool = False  # it answers them as well, unseen; the alias's version answers the caller


class NewGuard(BaseModel):
    """When an alias rolls back by itself; it watches the split's version, or without one the alias's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_error_rate: Annotated[float, Field(ge=0, lt=1, strict=False)] | None = None
    min_acceptance: Annotated[float, Field(gt=0, le=1, strict=False)] | None = None
    min_requests: Annotated[int, Field(ge=1, le=10**6)] = 50
    window_s: Annotated[int, Field(ge=10, le=86_400)] = 600


class AliasTarget(BaseModel):
    """The body of PUT …/aliases/{alias}."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=1, le=10**9)]
    split: NewSplit | None = None
    guard: NewGuard | None = None


@router.put("/v1/adapters/{name}/aliases/{alias}")
async def set_alias(name: str, alias: str, body: AliasTarget, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Point an alias at a version, and a part of its requests at another; `prod` is what the plain name means.

    With a `guard` it rolls back by itself when the newer version fails or drafts too badly.
    """
    tenant, store = caller.acting_tenant(Role.PUBLISHER), runtime.services.store
    split = Split(**body.split.model_dump()) if body.split is not None else None
    guard = Guard(**body.guard.model_dump()) if body.guard is not None else None
    if guard is not None and guard.max_error_rate is guard.min_acceptance is None:
        raise InvalidRequest(
            "'guard' names neither 'max_error_rate' nor 'min_acceptance'.", code="invalid_value", param="guard"
        )
    if split is not None and split.version == body.version:
        raise InvalidRequest("'split' names the alias's own version.", code="invalid_value", param="split.version")
    if split is not None:
        _check_alike(await store.get(tenant, check_name(name)), body.version, split.version)
    try:
        await store.set_alias(tenant, check_name(name), check_alias(alias), body.version, caller.key_id, split, guard)
    except NotPublished:
        if split is None:
            raise no_version(name, body.version) from None
        raise NotPublished(f"'{name}' has not both versions, {body.version} and {split.version}.") from None
    return {"object": "adapter.alias", "name": name, "alias": alias, **body.model_dump()}


def _check_alike(summary: AdapterSummary, one: int, other: int) -> None:
    """The same requests reach both: what one cannot take would fail for a part of the callers, and only there."""
    found = {version.version: version for version in summary.versions}
    if one in found and other in found and found[one].prompt_format != found[other].prompt_format:
        raise InvalidRequest(
            f"Version {one} takes {found[one].prompt_format} prompts and version {other} {found[other].prompt_format}: the "
            "same requests cannot go to both.",
            code="invalid_value",
            param="split.version",
        )


@router.delete("/v1/adapters/{name}/aliases/{alias}", status_code=204)
async def delete_alias(name: str, alias: str, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Remove an alias."""
    tenant = caller.acting_tenant(Role.PUBLISHER)
    await runtime.services.store.delete_alias(tenant, check_name(name), check_alias(alias), caller.key_id)
    return Response(status_code=204)


@router.post("/v1/adapters/{name}/aliases/{alias}/rollback")
async def roll_back_alias(name: str, alias: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Take an alias's split away; without one, point it at the version before its last move. Once more, and it is where it
    was."""
    tenant, store = caller.acting_tenant(Role.PUBLISHER), runtime.services.store
    try:
        version = await store.roll_back_alias(tenant, check_name(name), check_alias(alias), caller.key_id)
    except NotPublished:
        raise NotPublished(f"'{name}' has no version that its alias '{alias}' could go back to.") from None
    return {"object": "adapter.alias", "name": name, "alias": alias, "version": version}


@router.get("/v1/adapters/{name}/aliases")
async def list_alias_moves(name: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Where an adapter's aliases point, and what became of them: newest first."""
    tenant, store = caller.acting_tenant(), runtime.services.store
    summary = await visible(runtime, caller, name)
    moves = await store.alias_moves(tenant, name)
    data = [{"object": "adapter.alias.move", **move.model_dump(mode="json")} for move in moves]
    outcomes = [
        {"alias": alias, "version": version, **outcome.model_dump()}
        for (alias, version), outcome in (await store.outcomes(tenant, name)).items()
    ]
    return {
        "object": "list",
        "aliases": summary.aliases,
        "splits": {alias: split.model_dump() for alias, split in summary.splits.items()},
        "guards": {alias: guard.model_dump() for alias, guard in summary.guards.items()},
        "outcomes": outcomes,
        "data": data,
    }
