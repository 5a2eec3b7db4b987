"""What a gateway knows of the cluster: Serve's states, the replicas' own reports, the autoscaler's reasons."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from deployments.engine_client import RayEngineClient
from deployments.scaling_policy import read_decisions
from deployments.serve_states import ServedModel, States, once, replica_states
from slipstream.cluster.view import ModelView
from slipstream.errors import Unavailable

_TIMEOUT_S = 5.0


class RayCluster:
    """`ClusterClient` from inside a Serve replica."""

    def __init__(self, app: str, models: Mapping[str, ServedModel], engines: Mapping[str, RayEngineClient]) -> None:
        self._app, self._models, self._engines = app, models, engines

    async def view(self) -> Sequence[ModelView]:
        """See `ClusterClient`. Raises `Unavailable` while Serve's controller is away."""
        states = await replica_states(self._app)
        models = self._models.items()
        return await asyncio.gather(
            *(self._model(id_, model, states.get(model.deployment, {})) for id_, model in models)
        )

    async def _model(self, model_id: str, model: ServedModel, states: States) -> ModelView:
        decisions = once(f"decisions {model.deployment}", partial(read_decisions, self._app, model.deployment))
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reports, scaling = await asyncio.gather(self._engines[model_id].reports(), asyncio.shield(decisions))
        except TimeoutError as error:
            raise Unavailable("Ray's own store does not answer. Requests go on; try again.") from error
        return ModelView(
            model=model_id,
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            tensor_parallel_size=model.tensor_parallel_size,
            states=states,
            replicas=tuple(report for _, report in sorted(reports.items())),
            scaling=scaling,
        )
