"""Serve's request router for engines: `slipstream.cluster.routing` fed with what Serve knows of replicas.

One lives in each gateway. Which adapters a replica holds comes with Serve's list of replicas (`record_routing_stats`); how
busy it is from this router's own counts and Serve's probes. Serve takes the shortest queue of the first group that has room.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.trace import Span
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.route_spans import waiting_span
from slipstream.cluster.routing import AdapterRouting, ReplicaView, RouteKey, RoutingOptions, Tier
from slipstream.engine.residency import Residency
from slipstream.protocol import EngineStats, GenerateRequest

_PREFIX_CHARS = 1024  # prompts that begin alike for so long are sent to the same replica if that costs nothing
_TIERS = {
    Residency.ON_DEVICE.value: Tier.ON_DEVICE,
    Residency.ON_HOST.value: Tier.ON_HOST,
    Residency.FETCHING.value: Tier.COMING,
}


def routing_stats(stats: EngineStats) -> dict[str, Any]:
    """What a replica reports to routers. Each change of it goes to every router, so no counters are in it."""
    tiers = {_short(digest): _TIERS[state].value for digest, state in stats.adapters.items() if state in _TIERS}
    return {"adapters": dict(sorted(tiers.items())), "room": stats.slots_free > 0}


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:16]


def _view(replica: RunningReplica) -> ReplicaView:
    stats: Mapping[str, Any] = replica.routing_stats or {}
    tiers = {digest: Tier(tier) for digest, tier in stats.get("adapters", {}).items()}
    return ReplicaView(replica.replica_id.unique_id, tiers, has_room=bool(stats.get("room", True)))


def route_key(request: GenerateRequest) -> RouteKey:
    """What of a request decides where it goes."""
    adapter = _short(request.adapter.digest) if request.adapter is not None else None
    if request.token_ids is not None:
        beginning = repr(request.token_ids[: _PREFIX_CHARS // 4])
    else:
        texts = [m.content for m in request.messages] if request.messages is not None else [request.text or ""]
        beginning = "\0".join(texts)[:_PREFIX_CHARS]
    if len(beginning) < _PREFIX_CHARS // 4:  # too short to be worth a cache
        return RouteKey(adapter)
    return RouteKey(adapter, zlib.crc32(f"{request.tenant}\0{adapter}\0{beginning}".encode(errors="replace")))


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """See the module. `initialize_state` takes `RoutingOptions`' fields."""

    def initialize_state(self, **options: Any) -> None:
        """Called by Serve with `request_router_kwargs`."""
        self._routing = AdapterRouting(RoutingOptions(**options))
        self._by_name: dict[str, RunningReplica] = {}
        self._by_call: dict[int, PendingRequest] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's list has changed, or what one of them reports."""
        super().update_replicas(replicas)
        self._relist()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve found a replica dead before its controller did."""
        super().on_replica_actor_died(replica_id)
        self._relist()

    def _relist(self) -> None:
        self._by_name = {replica_id.unique_id: replica for replica_id, replica in self.curr_replicas.items()}
        self._routing.update([_view(replica) for replica in self._by_name.values()])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, best first."""
        key = RouteKey()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again at once, and for ever
            key = _key_of(pending_request)
        groups = self._routing.rank(key, self._queue_of, time.monotonic())
        return [[self._by_name[name] for name in group if name in self._by_name] for group in groups]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has taken a request."""
        key, name, now = _key_of(pending_request), replica_id.unique_id, time.monotonic()
        span = _span_of(pending_request)
        if span is not None:
            tier = {"slipstream.adapter.tier": self._routing.tier(name, key.adapter, now).value} if key.adapter else {}
            chosen = {"slipstream.replica": name, "slipstream.queue": self._queue_of(name), **tier}
            span.set_attributes({**chosen, "slipstream.replicas": len(self._by_name)})
            span.add_event("replica chosen", chosen)
        self._routing.routed(key, name, now)

    def _queue_of(self, name: str) -> int:
        replica = self._by_name.get(name)
        return (self.replica_queue_len_cache.get(replica.replica_id) or 0) if replica is not None else 0

    # Serve finds a waiting request again by its parent's id, which several calls under one parent share; without a FIFO
    # order all but the first then wait for ever. These three go by the call itself.

    def _add_pending_request_to_indices(self, pending_request: PendingRequest) -> None:
        super()._add_pending_request_to_indices(pending_request)
        self._by_call[id(pending_request.metadata)] = pending_request

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        super()._remove_pending_request_from_indices(pending_request)
        self._by_call.pop(id(pending_request.metadata), None)

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> PendingRequest | None:
        found = self._by_call.get(id(request_metadata))
        return found if found is not None and not found.future.done() else None


def _span_of(pending_request: PendingRequest) -> Span | None:
    arguments: Sequence[Any] = pending_request.args
    if arguments and isinstance(arguments[0], GenerateRequest):
        return waiting_span(arguments[0])
    return None


def _key_of(pending_request: PendingRequest) -> RouteKey:
    arguments: Sequence[Any] = pending_request.args
    if arguments and isinstance(arguments[0], GenerateRequest):
        return route_key(arguments[0])
    return RouteKey()
