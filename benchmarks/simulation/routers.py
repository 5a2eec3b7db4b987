"""Routers to compare: ours, and what others do. Each gateway has one of its own and knows only what it has seen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Protocol

from benchmarks.simulation.cluster import Cluster, Replica, Request
from slipstream.cluster.rendezvous import first, seed_of
from slipstream.cluster.routing import AdapterRouting, ReplicaView, RouteKey, RoutingOptions


class Router(Protocol):
    """Where a request goes."""

    def update(self, replicas: Sequence[Replica]) -> None:
        """Replicas came, went, or reported."""
        ...

    def pick(self, request: Request, now: float) -> str:
        """A replica's name."""
        ...


class Known:
    """The queue lengths that one gateway believes in: what a replica answered with, and its own requests since."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._queues: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        """Requests on a replica."""
        return self._queues.get(name, 0)

    def sent(self, name: str) -> None:
        """A replica took a request, and told its queue."""
        self._queues[name] = self._cluster.replicas[name].queue

    def ended(self, name: str) -> None:
        """One of ours has ended."""
        self._queues[name] = max(0, self._queues.get(name, 1) - 1)


class RoundRobin:
    """One after the other."""

    def __init__(self, queue_of: Known) -> None:
        self._names: list[str] = []
        self._turns = itertools.count()

    def update(self, replicas: Sequence[Replica]) -> None:
        """See `Router`."""
        self._names = [replica.name for replica in replicas]

    def pick(self, request: Request, now: float) -> str:
        """See `Router`."""
        return self._names[next(self._turns) % len(self._names)]


class PowerOfTwo(RoundRobin):
    """The shorter queue of two: Serve's own choice for a deployment without multiplexing."""

    def __init__(self, queue_of: Known) -> None:
        super().__init__(queue_of)
        self._queue_of = queue_of
        self._rng = random.Random(1)

    def pick(self, request: Request, now: float) -> str:
        """See `Router`."""
        two = self._rng.sample(self._names, 2) if len(self._names) > 1 else self._names
        return min(two, key=self._queue_of)


class Sticky(RoundRobin):
    """An adapter always goes to the first of its rendezvous order."""

    def __init__(self, queue_of: Known) -> None:
        super().__init__(queue_of)
        self._homes: dict[str, str] = {}

    def update(self, replicas: Sequence[Replica]) -> None:
        """See `Router`."""
        if [replica.name for replica in replicas] != self._names:
            self._homes = {}
        super().update(replicas)

    def pick(self, request: Request, now: float) -> str:
        """See `Router`."""
        if request.adapter is None:
            return super().pick(request, now)
        if request.adapter not in self._homes:
            self._homes[request.adapter] = first(request.adapter, [(n, seed_of(n)) for n in self._names], 1)[0]
        return self._homes[request.adapter]


class Ours:
    """The policy that `deployments.adapter_router` runs."""

    def __init__(self, queue_of: Known, options: RoutingOptions | None = None) -> None:
        self._queue_of = queue_of
        self.policy = AdapterRouting(options, random.Random(1))

    def update(self, replicas: Sequence[Replica]) -> None:
        """See `Router`."""
        self.policy.update([ReplicaView(r.name, r.tiers(), r.has_room) for r in replicas])

    def pick(self, request: Request, now: float) -> str:
        """See `Router`. Serve takes the shortest queue of the first group."""
        key = RouteKey(request.adapter)
        chosen = min(self.policy.rank(key, self._queue_of, now)[0], key=self._queue_of)
        self.policy.routed(key, chosen, now)
        return chosen
