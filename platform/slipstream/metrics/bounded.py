"""Counters by a bounded label: see `top.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from slipstream.metrics.catalogue import counter_family, spec_of, summary_family
from slipstream.metrics.top import TopLabels


class BoundedCounter(Collector):
    """A counter one of whose labels is bounded; a label that is given up takes its series along."""

    def __init__(self, name: str, bounded: str, top: TopLabels, registry: CollectorRegistry) -> None:
        self._name, self._top = name, top
        self._place = spec_of(name).labels.index(bounded)
        self._counts: defaultdict[str, defaultdict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
        top.on_forget(lambda label: self._counts.pop(label, None))
        registry.register(self)

    def inc(self, value: str, *others: str, amount: float = 1.0) -> None:
        """Add to the series of a value and the other labels, in the catalogue's order."""
        self._counts[self._top.label(value)][others] += amount

    def _series(self) -> Iterator[tuple[list[str], float]]:
        for label, counts in list(self._counts.items()):  # copies: another thread may be counting
            for others, count in list(counts.items()):
                yield [*others[: self._place], label, *others[self._place :]], count

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For the registry."""
        family = counter_family(self._name)
        for labels, count in self._series():
            family.add_metric(labels, count)
        yield family

    def describe(self) -> Iterator[CounterMetricFamily]:
        """What `collect` will give."""
        yield counter_family(self._name)


class BoundedSummary(Collector):
    """Sum and count, likewise."""

    def __init__(self, name: str, bounded: str, top: TopLabels, registry: CollectorRegistry) -> None:
        self._name, self._top = name, top
        self._place = spec_of(name).labels.index(bounded)
        self._counts: defaultdict[str, dict[tuple[str, ...], tuple[int, float]]] = defaultdict(dict)
        top.on_forget(lambda label: self._counts.pop(label, None))
        registry.register(self)

    def observe(self, value: str, *others: str, amount: float) -> None:
        """Add one observation."""
        counts = self._counts[self._top.label(value)]
        count, total = counts.get(others, (0, 0.0))
        counts[others] = (count + 1, total + amount)

    def collect(self) -> Iterator[SummaryMetricFamily]:
        """For the registry."""
        family = summary_family(self._name)
        for label, counts in list(self._counts.items()):
            for others, (count, total) in list(counts.items()):
                family.add_metric([*others[: self._place], label, *others[self._place :]], count, total)
        yield family

    def describe(self) -> Iterator[SummaryMetricFamily]:
        """What `collect` will give."""
        yield summary_family(self._name)
