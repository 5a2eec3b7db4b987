"""`FakeCluster`: a `ClusterClient` that says what it is told."""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.cluster.view import ClusterClient, ModelView


class FakeCluster(ClusterClient):
    """Shows `models`, or fails with `outage`."""

    def __init__(self, *models: ModelView) -> None:
        self.models = models
        self.outage: Exception | None = None

    async def view(self) -> Sequence[ModelView]:
        """What it was told."""
        if self.outage is not None:
            raise self.outage
        return self.models
