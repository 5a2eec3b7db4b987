"""One page for all processes: each says what it counts, and whoever is asked puts it together.

Behind Serve's proxies a scrape reaches some gateway, each time another one. So every gateway answers for all gateways and
engine replicas: a counter that is asked for through another gateway is the same counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from slipstream.metrics.catalogue import SPECS, gauge_family

_PRIVATE = frozenset(spec.family for spec in SPECS if spec.private)
_MODEL = "model"


@dataclass(frozen=True, slots=True)
class Process:
    """A replica, as labels name it; `model` is empty for a gateway."""

    replica: str
    model: str = ""

    @property
    def role(self) -> str:
        """`gateway` or `engine`."""
        return "engine" if self.model else "gateway"


@dataclass(frozen=True, slots=True)
class Page:
    """What one process counts. Families are prometheus_client's own, without labels of the process."""

    process: Process
    families: tuple[Metric, ...]


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the others said, and who of those that Serve says run did not."""

    pages: Sequence[Page] = ()
    silent: Sequence[Process] = ()


class MetricsPeers(Protocol):
    """The other processes of the application, as a gateway sees them."""

    @property
    def own_name(self) -> str:
        """The replica that asks."""
        ...

    async def gather(self, timeout_s: float) -> Gathered:
        """Ask all of them, for so long; raises nothing. Wakes nobody. The asking gateway is not among them."""
        ...


def page_of(process: Process, registry: CollectorRegistry) -> Page:
    """A registry's families, without the times at which counters began, which nothing here reads."""
    return Page(process, tuple(map(_without_created, registry.collect())))


def _without_created(metric: Metric) -> Metric:
    kept = Metric(metric.name, metric.documentation, metric.type)
    kept.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    return kept


def render(pages: Iterable[Page], silent: Iterable[Process], cluster: Iterable[Metric], *, names: bool) -> bytes:
    """The text. Samples of a family lie together, whichever process they are from. `names`: whether metrics that name
    tenants and adapters are in it."""
    merged: dict[str, Metric] = {}
    up = gauge_family("replica_up")
    for page in pages:
        process = page.process
        up.add_metric([process.role, process.model, process.replica], 1)
        for family in page.families:
            _add(merged, family, _labels(process))
    for process in silent:
        up.add_metric([process.role, process.model, process.replica], 0)
    for family in (up, *cluster):
        _add(merged, family, {})
    return generate_latest(_Collected([m for m in merged.values() if names or m.name not in _PRIVATE]))


def _labels(process: Process) -> Mapping[str, str]:
    return {"replica": process.replica} | ({_MODEL: process.model} if process.model else {})


def _add(merged: dict[str, Metric], family: Metric, labels: Mapping[str, str]) -> None:
    known = merged.get(family.name)
    if known is None:
        known = merged[family.name] = Metric(family.name, family.documentation, family.type)
    known.samples += [sample._replace(labels={**sample.labels, **labels}) for sample in family.samples]


class _Collected(Collector):
    """Families that are there already, as what `generate_latest` takes."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """As they are."""
        return iter(self._families)
