"""What is the same whoever is asked: how many replicas there are and are to be, and why they changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from prometheus_client.core import Metric

from slipstream.cluster.scaling import Cause
from slipstream.cluster.view import ModelView
from slipstream.metrics.catalogue import counter_family, gauge_family

STATES = ("running", "starting", "updating", "stopping", "pending_migration", "recovering")


def cluster_families(models: Sequence[ModelView]) -> Iterator[Metric]:
    """Of every base model."""
    states, desired, most = (gauge_family(name) for name in ("replicas", "replicas_desired", "replicas_max"))
    decisions = counter_family("scaling_decisions_total")
    for view in models:
        found = {state.lower(): count for state, count in view.states.items()}
        for state in dict.fromkeys((*STATES, *found)):
            states.add_metric([view.model, state], found.get(state, 0))
        steady = view.scaling.steady
        desired.add_metric([view.model], view.min_replicas if steady is None else steady.after)
        most.add_metric([view.model], view.max_replicas)
        for direction, cause in product(("up", "down"), Cause):
            decisions.add_metric([view.model, direction, cause], view.scaling.counts.get(f"{direction}/{cause}", 0))
    yield from (states, desired, most, decisions)
