"""GET /v1/models: the base models, and the tenant's adapters under the names that requests use."""

from __future__ import annotations

from fastapi import APIRouter

from adapter_registry.records import AdapterVersion
from slipstream.api.auth import CallerDep
from slipstream.api.catalog import Target
from slipstream.api.runtime import Runtime, RuntimeDep
from slipstream.api.sse import Json

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def list_models(caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Everything that may stand in the field `model`; others' adapters, where they are shared, as `tenant/name`."""
    bases = await runtime.catalog.bases()
    models = [_base(target, runtime) for target in bases if caller.may_call(target.base_id)]
    if caller.tenant is not None:
        for summary in await runtime.services.store.list(caller.tenant):
            if summary.current is not None and caller.may_call(summary.name):
                models.append(_adapter(summary.name, summary.current))
        for summary in await runtime.services.store.shared_with(caller.tenant):
            label = f"{summary.tenant}/{summary.name}"
            if summary.current is not None and caller.may_call(label):
                models.append(_adapter(label, summary.current))
    return {"object": "list", "data": models}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """One of them; references such as `name@3` and `name@alias` work too."""
    target = await runtime.catalog.resolve(caller, model)
    return _base(target, runtime) if target.version is None else _adapter(model, target.version)


def _base(target: Target, runtime: Runtime) -> Json:
    return {
        "id": target.base_id,
        "object": "model",
        "created": runtime.started_at,
        "owned_by": "slipstream",
        "parent": None,
        "max_model_len": target.spec.context_length,
    }


def _adapter(model: str, version: AdapterVersion) -> Json:
    return {
        "id": model,
        "object": "model",
        "created": int(version.created_at.timestamp()),
        "owned_by": version.tenant,
        "parent": version.base_model,
        "version": version.version,
        "kind": version.kind,
        "prompt_format": version.prompt_format,
    }
