"""GET /v1/cluster: replicas, ranks, queues, residency and scaling decisions with their reasons. For the admin."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter

from slipstream.api.auth import CallerDep
from slipstream.api.runtime import RuntimeDep
from slipstream.api.sse import Json
from slipstream.cluster.view import ModelView, ReplicaReport

router = APIRouter(tags=["Operations"])


@router.get("/v1/cluster")
async def show_cluster(caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Every base model's replicas, as they are now. 503 while Serve's controller is away; requests go on then."""
    caller.require_admin()
    return {"object": "cluster", "models": [_model(model) for model in await runtime.services.cluster.view()]}


def _model(model: ModelView) -> Json:
    return {
        "model": model.model,
        "min_replicas": model.min_replicas,
        "max_replicas": model.max_replicas,
        "tensor_parallel_size": model.tensor_parallel_size,
        "states": dict(model.states),
        "replicas": [_replica(replica) for replica in model.replicas],
        "scaling": None if model.scaling.steady is None else asdict(model.scaling.steady),
        "scaling_changes": [asdict(change) for change in model.scaling.changes],
    }


def _replica(replica: ReplicaReport) -> Json:
    stats = replica.stats
    return {
        "replica": replica.replica,
        "up_s": round(replica.up_s, 1),
        "ranks": [asdict(rank) for rank in replica.ranks],
        "running": stats.running,
        "waiting": stats.waiting,
        "queue_wait_s": round(stats.queue_wait_s, 3),
        "kv_blocks_free": stats.kv_blocks_free,
        "kv_blocks_total": stats.kv_blocks_total,
        "adapter_slots": stats.adapter_slots,
        "adapter_slots_free": stats.slots_free,
        "adapters": dict(stats.adapters),
        "completion_tokens": stats.completion_tokens,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "acceptance": round(stats.accepted_tokens / stats.drafted_tokens, 4) if stats.drafted_tokens else None,
    }
