"""What the dashboards show: panels as plain data, and the overview and tenant boards. `dashboards.py` makes JSON of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CALLS = 'route=~"/v1/(chat/)?completions"'


@dataclass(frozen=True)
class Plot:
    """A time series panel: queries with their legends."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    text: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class Number:
    """One figure, now."""

    title: str
    unit: str
    query: str
    text: str = ""


@dataclass(frozen=True)
class Rows:
    """A table of one query's labels and values."""

    title: str
    query: str
    text: str = ""


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Plot | Number | Rows]


@dataclass(frozen=True)
class Board:
    """One dashboard. variables: label → the metric whose values it offers."""

    uid: str
    title: str
    text: str
    variables: dict[str, str]
    rows: Sequence[Row]


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, added up."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate(slipstream_{metric}{{{where}}}[$__rate_interval]))"


def quantile(q: float, metric: str, where: str, by: str = "") -> str:
    """Of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(metric + '_bucket', labels, where)})"


def latencies(title: str, metric: str, where: str, text: str = "") -> Plot:
    """Three quantiles."""
    return Plot(title, "s", [(quantile(q, metric, where), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)], text)


MODEL = 'model=~"$model"'
REPLICA = 'model=~"$model",replica=~"$replica"'
ADAPTER = 'model=~"$model",adapter=~"$adapter"'
TENANT = 'tenant=~"$tenant"'
FAILED, IN_TIME, FIRST = 'outcome="failed"', 'le="2.5"', 'position="1"'

OVERVIEW = Board(
    "slipstream-overview",
    "Slipstream / Overview",
    "Whether callers are served, how fast, and by how many replicas.",
    {"model": "slipstream_requests_total"},
    [
        Row(
            "Now",
            [
                Number("Calls", "reqps", rate("requests_total", where=MODEL)),
                Number(
                    "Failed calls",
                    "percentunit",
                    f"{rate('requests_total', where=f'{MODEL},{FAILED}')} / {rate('requests_total', where=MODEL)}",
                    "Ours, not the callers'. The objective is 0.1% over a month.",
                ),
                Number(
                    "First token within 2.5 s",
                    "percentunit",
                    f"{rate('time_to_first_token_seconds_bucket', where=f'{MODEL},{IN_TIME}')} / "
                    f"{rate('time_to_first_token_seconds_count', where=MODEL)}",
                    "Streams. The objective is 95% over a month.",
                ),
                Number("Answer tokens", "short", rate("completion_tokens_total", where=MODEL), "A second."),
                Number("Replicas that answer", "short", 'sum(slipstream_replica_up{role="engine",model=~"$model"})'),
                Number("Registry", "bool_on_off", "min(slipstream_registry_up)"),
            ],
        ),
        Row(
            "Callers",
            [
                Plot(
                    "Calls by outcome", "reqps", [(rate("requests_total", "outcome", MODEL), "{{outcome}}")], "", True
                ),
                Plot("HTTP answers by status", "reqps", [(rate("http_requests_total", "status", CALLS), "{{status}}")]),
                Plot(
                    "Broken streams",
                    "reqps",
                    [(rate("broken_streams_total", "model", MODEL), "{{model}}")],
                    "After their 200.",
                ),
                Plot(
                    "Refused with 429",
                    "reqps",
                    [(rate("tenant_rejections_total", "reason"), "{{reason}}")],
                    "Quotas, and full replicas.",
                ),
                latencies("Time to first token", "time_to_first_token_seconds", MODEL, "Streams."),
                latencies("Time per output token", "time_per_output_token_seconds", MODEL, "Streams, after the first."),
                latencies("Whole calls", "http_request_duration_seconds", CALLS),
                Plot(
                    "Tokens",
                    "short",
                    [
                        (rate("prompt_tokens_total", where=MODEL), "prompt"),
                        (rate("cached_prompt_tokens_total", where=MODEL), "prompt, cached"),
                        (rate("completion_tokens_total", where=MODEL), "answer"),
                    ],
                    "A second.",
                ),
                Plot(
                    "Speculation",
                    "short",
                    [
                        (rate("drafted_tokens_total", where=MODEL), "drafted"),
                        (rate("accepted_tokens_total", where=MODEL), "accepted"),
                    ],
                    "Tokens a second.",
                ),
            ],
        ),
        Row(
            "Replicas",
            [
                Plot(
                    "Replicas",
                    "short",
                    [
                        ('sum by (state) (slipstream_replicas{model=~"$model"})', "{{state}}"),
                        ('sum(slipstream_replicas_desired{model=~"$model"})', "desired"),
                        ('sum(slipstream_replicas_max{model=~"$model"})', "most"),
                    ],
                ),
                Plot(
                    "Scaling decisions",
                    "short",
                    [
                        (
                            'sum by (direction, cause) (slipstream_scaling_decisions_total{model=~"$model"})',
                            "{{direction}}: {{cause}}",
                        )
                    ],
                    "Changes so far.",
                ),
                Plot(
                    "Who answers",
                    "bool_on_off",
                    [("slipstream_replica_up", "{{role}} {{model}} {{replica}}")],
                ),
                Plot(
                    "Queue",
                    "short",
                    [
                        ('sum by (model) (slipstream_engine_running_sequences{model=~"$model"})', "{{model}} running"),
                        ('sum by (model) (slipstream_engine_waiting_sequences{model=~"$model"})', "{{model}} waiting"),
                    ],
                ),
            ],
        ),
        Row(
            "Registry",
            [
                Plot("Errors", "short", [(rate("registry_errors_total"), "errors a second")]),
                Plot(
                    "Usage that waits",
                    "short",
                    [
                        ("sum(slipstream_unsettled_requests)", "unsettled"),
                        ("sum(slipstream_lost_usage_requests_total)", "lost, so far"),
                    ],
                ),
                Plot("Publishes", "short", [("sum by (outcome) (slipstream_publishes_total)", "{{outcome}}")]),
                Plot("Imports", "short", [("sum by (state) (slipstream_imports_total)", "{{state}}")]),
                Plot(
                    "Webhook deliveries",
                    "short",
                    [("sum by (outcome) (slipstream_webhook_deliveries_total)", "{{outcome}}")],
                ),
            ],
        ),
    ],
)

TENANTS = Board(
    "slipstream-tenant",
    "Slipstream / Tenant",
    "The busiest tenants of each gateway; all others are `other`. Needs the metrics key.",
    {"tenant": "slipstream_tenant_requests_total"},
    [
        Row(
            "Use",
            [
                Plot("Calls", "reqps", [(rate("tenant_requests_total", "tenant", TENANT), "{{tenant}}")], "", True),
                Plot("Calls by outcome", "reqps", [(rate("tenant_requests_total", "outcome", TENANT), "{{outcome}}")]),
                Plot(
                    "Tokens",
                    "short",
                    [(rate("tenant_tokens_total", "tenant, kind", TENANT), "{{tenant}} {{kind}}")],
                    "A second.",
                ),
                Plot(
                    "Share of all tokens",
                    "percentunit",
                    [
                        (
                            f"{rate('tenant_tokens_total', 'tenant', TENANT)} / on () group_left () "
                            f"{rate('tenant_tokens_total')}",
                            "{{tenant}}",
                        )
                    ],
                ),
            ],
        ),
        Row(
            "Quotas",
            [
                Plot(
                    "Used",
                    "percentunit",
                    [
                        (
                            f"max by (tenant, quota) (slipstream_tenant_quota_used_ratio{{{TENANT}}})",
                            "{{tenant}} {{quota}}",
                        )
                    ],
                ),
                Plot(
                    "Refused with 429",
                    "reqps",
                    [(rate("tenant_rejections_total", "tenant, reason", TENANT), "{{tenant}} {{reason}}")],
                ),
            ],
        ),
        Row(
            "Adapters",
            [
                Plot(
                    "Calls by adapter",
                    "reqps",
                    [
                        (
                            f"sum by (tenant, name, version) ({rate('adapter_requests_total', 'adapter')} * on (adapter) "
                            "group_left (tenant, name, version) topk by (adapter) (1, "
                            f"max by (adapter, tenant, name, version) (slipstream_adapter_info{{{TENANT}}})))",
                            "{{tenant}}/{{name}}@{{version}}",
                        )
                    ],
                    "Of the owners; who calls a shared adapter is above.",
                ),
            ],
        ),
    ],
)
