"""The ranks of a tensor-parallel replica: rank 0 is the replica's own process, the others are actors in its placement group.

They live and die together. An actor ends when rank 0 hangs up, and Ray ends it when the replica's process does; the replica
ends its own process as soon as one of them does (`EngineReplica`), so that no rank is ever left alone in a collective.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.replica_plan import ReplicaPlan, engine_config
from slipstream.base_models import prepare_base_model
from slipstream.cluster.view import RankReport

# With the engine comes torch, which a gateway, that knows this module's neighbours, has no use for.
if TYPE_CHECKING:
    from slipstream.engine.parallel.ranks import Meeting


@cache
def own_address() -> str:
    """Where other nodes reach this one, as Ray was told: loopback where everything is on one machine. (Ray's own
    `get_node_ip_address` looks for an address that the world sees.)"""
    own = ray.get_runtime_context().get_node_id()
    return str(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own))


class RankProcess:
    """One rank from 1 on."""

    def __init__(self, plan: ReplicaPlan, rank: int) -> None:
        self._plan, self._rank = plan, rank

    def report(self) -> RankReport:
        """Where it runs."""
        return RankReport(self._rank, own_address(), os.getpid())

    def follow(self, meeting: Meeting) -> None:
        """Do what rank 0 says until it hangs up. Raises when this rank is of no more use."""
        from slipstream.engine.build import follow  # noqa: PLC0415
        from slipstream.engine.parallel.ranks import Follower  # noqa: PLC0415

        prepared = prepare_base_model(self._plan.model.base_model, self._plan.home)
        size = self._plan.model.tensor_parallel_size
        follower = Follower(meeting, self._rank, size, own_address())
        follow(engine_config(self._plan, prepared.path), follower)


class Ranks:
    """All ranks of one replica, as its own process sees them."""

    def __init__(self, plan: ReplicaPlan) -> None:
        """Starts the actors; they load nothing before they have met."""
        from slipstream.engine.parallel.ranks import Lead  # noqa: PLC0415

        model = plan.model
        group = get_current_placement_group()
        assert group is not None, "a tensor-parallel replica needs a placement group"
        self.lead = Lead(own_address(), model.tensor_parallel_size)
        remote: Any = ray.remote(max_restarts=0, max_concurrency=2)(RankProcess)
        self._actors = [
            remote.options(
                num_cpus=model.engine_cpus,
                num_gpus=model.engine_gpus,
                resources=model.engine_resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(plan, rank)
            for rank in range(1, model.tensor_parallel_size)
        ]
        self._lives = [asyncio.ensure_future(_life(actor.follow.remote(self.lead.meeting))) for actor in self._actors]

    async def first_end(self) -> None:
        """Returns, or raises what it raised, when the first of them has ended."""
        done, _ = await asyncio.wait(self._lives, return_when=asyncio.FIRST_COMPLETED)
        for life in done:
            life.result()

    async def reports(self) -> Sequence[RankReport]:
        """Where they run, without rank 0."""
        found: list[RankReport] = await asyncio.gather(*(_life(actor.report.remote()) for actor in self._actors))
        return found

    async def answering(self, timeout_s: float) -> int:
        """How many of the others answer within the time."""
        asked = [asyncio.ensure_future(_life(actor.report.remote())) for actor in self._actors]
        done, late = await asyncio.wait(asked, timeout=timeout_s)
        for call in late:
            call.cancel()
        return sum(call.exception() is None for call in done)


async def _life(ref: Any) -> Any:
    return await ref
