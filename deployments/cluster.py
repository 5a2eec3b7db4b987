"""What a gateway knows of the cluster: Serve's states, the replicas' own reports, the autoscaler's reasons."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from deployments.engine_client import RayEngineClient
from deployments.scaling_policy import read_decisions
from deployments.serve_states import ServedModel, States, replica_states
from slipstream.cluster.view import ModelView


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
        reports, scaling = await asyncio.gather(
            self._engines[model_id].reports(), asyncio.to_thread(read_decisions, self._app, model.deployment)
        )
        return ModelView(
            model=model_id,
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            tensor_parallel_size=model.tensor_parallel_size,
            states=states,
            replicas=tuple(report for _, report in sorted(reports.items())),
            scaling=scaling,
        )
