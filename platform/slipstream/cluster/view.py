"""What people see of a cluster: replicas, ranks, queues, residency and why there are as many replicas as there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from slipstream.protocol import EngineStats


@dataclass(frozen=True, slots=True)
class RankReport:
    """One process of a tensor-parallel replica."""

    rank: int
    node: str
    pid: int


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What one replica says of itself."""

    replica: str
    ranks: tuple[RankReport, ...]  # rank 0 is the replica's own process
    up_s: float
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class ScalingRecord:
    """One change of a deployment's target, or the newest reason to leave it."""

    at: float  # Unix time
    before: int
    after: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScalingHistory:
    """What a deployment's autoscaler has written down."""

    steady: ScalingRecord | None = None  # why the target is what it is now; None without autoscaling
    changes: tuple[ScalingRecord, ...] = ()  # the last ones, newest last
    counts: Mapping[str, int] = field(default_factory=dict)  # all of them, by "up/cause" and "down/cause"


@dataclass(frozen=True, slots=True)
class ModelView:
    """One base model's deployment."""

    model: str
    min_replicas: int
    max_replicas: int
    tensor_parallel_size: int
    states: Mapping[str, int] = field(default_factory=dict)  # Serve's replica states → how many
    replicas: tuple[ReplicaReport, ...] = ()  # those that answer
    scaling: ScalingHistory = ScalingHistory()


class ClusterClient(Protocol):
    """Where `/v1/cluster` looks."""

    async def view(self) -> Sequence[ModelView]:
        """Every base model. Raises `Unavailable` when nobody can tell."""
        ...


_OTHERWISE = {"adapters", "queue_wait_s", "queue", "starts_per_s", "replicas"}
_SUMMED = tuple(f.name for f in fields(EngineStats) if f.name not in _OTHERWISE)


def total(stats: Sequence[EngineStats]) -> EngineStats:
    """The counters of several replicas as one: added up, but for waits (the longest) and residency (the nearest wins)."""
    nearest: dict[str, str] = {}
    for one in stats:
        for digest, residency in one.adapters.items():
            if digest not in nearest or residency == "on_device":
                nearest[digest] = residency
    rates = [one.starts_per_s for one in stats if one.starts_per_s is not None]
    return EngineStats(
        **{name: sum(getattr(one, name) for one in stats) for name in _SUMMED},
        adapters=nearest,
        queue_wait_s=max((one.queue_wait_s for one in stats), default=0.0),
        queue=tuple(queued for one in stats for queued in one.queue),
        starts_per_s=sum(rates) if rates else None,
        replicas=len(stats),
    )
