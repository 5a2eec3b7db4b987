"""Prometheus metrics of the HTTP side. Labels are bounded: route templates, base models, statuses; no client text."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from slipstream.protocol import EngineStats, Usage

_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = (
    "running",
    "waiting",
    "kv_blocks_total",
    "kv_blocks_free",
    "steps",
    "prompt_tokens",
    "completion_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "preemptions",
    "prefix_hit_tokens",
    "sequences",
    "queue_wait_s",
    "replicas",
)


class HttpMetrics:
    """One registry per application, so that several can live in one process (tests do that)."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "slipstream_http_requests_total", "Answered requests.", ["route", "method", "status"], registry=own
        )
        self._latency = Histogram(
            "slipstream_http_request_seconds",
            "From arrival to the last byte.",
            ["route"],
            buckets=_SECONDS,
            registry=own,
        )
        self._ttft = Histogram(
            "slipstream_time_to_first_token_seconds",
            "From arrival to the first token.",
            ["model"],
            buckets=_SECONDS,
            registry=own,
        )
        self._tokens = Counter(
            "slipstream_tokens_total", "Tokens of finished requests.", ["model", "kind"], registry=own
        )
        self._engine = {
            name: Gauge(f"slipstream_engine_{name}", f"The engine's {name.replace('_', ' ')}.", ["model"], registry=own)
            for name in _GAUGES
        }
        self._adapters = Gauge(
            "slipstream_engine_adapters",
            "Adapters by where they are on the replica.",
            ["model", "residency"],
            registry=own,
        )
        self._up = Gauge("slipstream_engine_up", "1 when the engine answered the last probe.", ["model"], registry=own)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one response."""
        known = method if method in _METHODS else "OTHER"
        self._requests.labels(route, known, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Observe one time to first token."""
        self._ttft.labels(model).observe(seconds)

    def generated(self, model: str, usage: Usage) -> None:
        """Add one finished choice."""
        counts = {
            "completion": usage.completion_tokens,
            "drafted": usage.drafted_tokens,
            "accepted": usage.accepted_tokens,
        }
        for kind, count in counts.items():
            self._tokens.labels(model, kind).inc(count)

    def prompted(self, model: str, prompt_tokens: int, cached_tokens: int) -> None:
        """Add one prompt."""
        self._tokens.labels(model, "prompt").inc(prompt_tokens)
        self._tokens.labels(model, "prompt_cached").inc(cached_tokens)

    def render(self, engines: Mapping[str, EngineStats | None]) -> bytes:
        """The page; `engines` holds each engine's snapshot, None for one that did not answer."""
        self._adapters.clear()
        for model, stats in engines.items():
            self._up.labels(model).set(stats is not None)
            if stats is None:
                continue
            for name, gauge in self._engine.items():
                gauge.labels(model).set(getattr(stats, name))
            for residency in stats.adapters.values():
                self._adapters.labels(model, residency).inc()
        return generate_latest(self._registry)
