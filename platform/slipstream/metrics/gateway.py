"""What one gateway counts: what callers see, by route, base model, adapter and tenant."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapter_registry.records import AdapterVersion
from slipstream.metrics.bounded import BoundedCounter, BoundedSummary
from slipstream.metrics.catalogue import counter, counter_family, gauge_family, histogram
from slipstream.metrics.pages import Page, Process, page_of
from slipstream.metrics.top import TopLabels, short_digest
from slipstream.protocol import Usage

TOP_ADAPTERS = 20
TOP_TENANTS = 50
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})


class Outcome(StrEnum):
    """How a call of a model ended."""

    OK = "ok"
    REFUSED = "refused"  # what the caller sent, or too much of it
    FAILED = "failed"  # ours
    CANCELLED = "cancelled"  # the caller left


class Publish(StrEnum):
    """How an upload in one form ended."""

    NEW = "new"
    EXISTING = "existing"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Called:
    """Who called what."""

    model: str  # the base
    tenant: str
    adapter: str | None = None  # digest


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a gateway knows of what stands behind it, read at the scrape."""

    registry_up: bool = True
    registry_errors: int = 0
    unsettled: int = 0
    lost: int = 0
    quotas: Iterable[tuple[str, str, float]] = ()  # tenant, quota, share that is used


class GatewayMetrics:
    """One registry per application, so that several can live in one process (tests do that)."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        top_adapters: int = TOP_ADAPTERS,
        top_tenants: int = TOP_TENANTS,
    ) -> None:
        self._registry = own = CollectorRegistry()
        self._adapters = TopLabels(top_adapters, clock, name=short_digest)
        self._tenants = TopLabels(top_tenants, clock)
        self._http = counter("http_requests_total", own)
        self._latency = histogram("http_request_duration_seconds", own)
        self._calls = counter("requests_total", own)
        self._broken = counter("broken_streams_total", own)
        self._ttft = histogram("time_to_first_token_seconds", own)
        self._gap = histogram("time_per_output_token_seconds", own)
        tokens = ("prompt", "cached_prompt", "completion", "drafted", "accepted")
        self._tokens = {kind: counter(f"{kind}_tokens_total", own) for kind in tokens}
        self._publishes = counter("publishes_total", own)
        self._imports = counter("imports_total", own)
        self._deliveries = counter("webhook_deliveries_total", own)
        adapters, tenants = self._adapters, self._tenants
        self._adapter_calls = BoundedCounter("adapter_requests_total", "adapter", adapters, own)
        self._adapter_tokens = BoundedCounter("adapter_completion_tokens_total", "adapter", adapters, own)
        self._adapter_ttft = BoundedSummary("adapter_time_to_first_token_seconds", "adapter", adapters, own)
        self._tenant_calls = BoundedCounter("tenant_requests_total", "tenant", tenants, own)
        self._tenant_tokens = BoundedCounter("tenant_tokens_total", "tenant", tenants, own)
        self._rejections = BoundedCounter("tenant_rejections_total", "tenant", tenants, own)
        self._infos = _AdapterInfos(adapters, own)
        for each, values in ((self._publishes, Publish), (self._deliveries, ("delivered", "failed"))):
            for value in values:
                each.labels(value)
        for state in ("ready", "rejected"):
            self._imports.labels(state)
        ProcessCollector(registry=own)

    # -- HTTP -----------------------------------------------------------------------------------------------------

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one response."""
        known = method if method in _METHODS else "OTHER"
        self._http.labels(route, known, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    # -- calls ----------------------------------------------------------------------------------------------------

    def begun(self, called: Called, version: AdapterVersion | None) -> None:
        """A call was let in by its tenant's quota."""
        self._tenants.note(called.tenant)
        for outcome in Outcome:  # a rate needs a zero before the first error
            self._calls.labels(called.model, outcome)
        self._broken.labels(called.model)
        if called.adapter is not None:
            self._adapters.note(called.adapter)
        if version is not None:
            self._infos.note(version)

    def first_token(self, called: Called, seconds: float) -> None:
        """Observe one time to first token."""
        self._ttft.labels(called.model).observe(seconds)
        if called.adapter is not None:
            self._adapter_ttft.observe(called.adapter, called.model, amount=seconds)

    def later_tokens(self, called: Called, tokens: int, seconds: float) -> None:
        """Observe a stream's mean time per token after its first ones."""
        self._gap.labels(called.model).observe(seconds / tokens)

    def generated(self, called: Called, usage: Usage) -> None:
        """Add one finished choice."""
        self._tokens["completion"].labels(called.model).inc(usage.completion_tokens)
        self._tokens["drafted"].labels(called.model).inc(usage.drafted_tokens)
        self._tokens["accepted"].labels(called.model).inc(usage.accepted_tokens)
        if called.adapter is not None:
            self._adapter_tokens.inc(called.adapter, called.model, amount=usage.completion_tokens)

    def prompted(self, called: Called, prompt_tokens: int, cached_tokens: int) -> None:
        """Add one prompt."""
        self._tokens["prompt"].labels(called.model).inc(prompt_tokens)
        self._tokens["cached_prompt"].labels(called.model).inc(cached_tokens)

    def ended(self, called: Called, outcome: Outcome, prompt_tokens: int, completion_tokens: int) -> None:
        """A call has ended, and used so many tokens."""
        self._calls.labels(called.model, outcome).inc()
        self._tenant_calls.inc(called.tenant, outcome)
        self._tenant_tokens.inc(called.tenant, "prompt", amount=prompt_tokens)
        self._tenant_tokens.inc(called.tenant, "completion", amount=completion_tokens)
        if called.adapter is not None:
            self._adapter_calls.inc(called.adapter, called.model, outcome)

    def broke(self, called: Called) -> None:
        """A stream ended with an error after it had begun."""
        self._broken.labels(called.model).inc()

    def rejected(self, tenant: str, reason: str) -> None:
        """A call was answered 429."""
        self._tenants.note(tenant)
        self._rejections.inc(tenant, reason)

    # -- the rest -------------------------------------------------------------------------------------------------

    def published(self, outcome: Publish) -> None:
        """An upload in one form has ended."""
        self._publishes.labels(outcome).inc()

    def imported(self, state: str) -> None:
        """An import has ended."""
        self._imports.labels(state).inc()

    def delivered(self, ok: bool) -> None:
        """An event was offered to a webhook."""
        self._deliveries.labels("delivered" if ok else "failed").inc()

    def tenants(self) -> Iterable[str]:
        """Those that have a label of their own."""
        return [tenant for tenant, _ in self._tenants.named()]

    def page(self, process: Process, around: Surroundings) -> Page:
        """All of it, now."""
        return Page(process, (*page_of(process, self._registry).families, *_families(around)))


def _families(around: Surroundings) -> Iterator[Metric]:
    for name, value in (("registry_up", float(around.registry_up)), ("unsettled_requests", around.unsettled)):
        measured = gauge_family(name)
        measured.add_metric([], value)
        yield measured
    for name, count in (
        ("registry_errors_total", around.registry_errors),
        ("lost_usage_requests_total", around.lost),
    ):
        counted = counter_family(name)
        counted.add_metric([], count)
        yield counted
    shares = gauge_family("tenant_quota_used_ratio")
    for tenant, quota, share in around.quotas:
        shares.add_metric([tenant, quota], share)
    yield shares


class _AdapterInfos(Collector):
    """What the digests of named adapters are called: the last name that was used."""

    def __init__(self, top: TopLabels, registry: CollectorRegistry) -> None:
        self._top = top
        self._known: dict[str, AdapterVersion] = {}
        top.on_forget(lambda label: self._known.pop(label, None))
        registry.register(self)

    def note(self, version: AdapterVersion) -> None:
        """It was called, a moment ago."""
        label = self._top.label(version.digest)
        if label == short_digest(version.digest):
            self._known[label] = version

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """For the registry."""
        (family,) = self.describe()
        for label, version in list(self._known.items()):
            family.add_metric([label, version.tenant, version.name, str(version.version)], 1)
        yield family

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """What `collect` will give."""
        yield gauge_family("adapter_info")
