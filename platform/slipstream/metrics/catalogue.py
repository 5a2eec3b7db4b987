"""Every metric there is, once: name, type, labels and meaning. What counts them makes them from here, and
`docs/operations/metrics.md` shows this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
MAX_POSITION = 8  # drafts further on are counted here


class Kind(StrEnum):
    """Prometheus's types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"


class Source(StrEnum):
    """Who counts it, and so which labels it has beside its own."""

    GATEWAY = "gateway"  # `replica`
    ENGINE = "engine"  # `replica`, `model`
    CLUSTER = "cluster"  # none: whoever is asked says the same


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric. `private`: its labels name tenants or adapters, so it is shown to operators only."""

    name: str
    kind: Kind
    source: Source
    labels: tuple[str, ...]
    help: str
    buckets: Sequence[float] = ()

    @property
    def family(self) -> str:
        """Its name as prometheus_client has it, which adds `_total` to counters itself."""
        return self.name.removesuffix("_total")

    @property
    def private(self) -> bool:
        return bool({"tenant", "adapter"} & set(self.labels))

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Its own, and those that its source adds."""
        own = {Source.GATEWAY: ("replica",), Source.ENGINE: ("replica", "model"), Source.CLUSTER: ()}[self.source]
        return tuple(dict.fromkeys((*own, *self.labels)))


def _gateway(name: str, kind: Kind, labels: str, text: str, buckets: Sequence[float] = ()) -> Spec:
    return Spec(f"slipstream_{name}", kind, Source.GATEWAY, tuple(labels.split()), text, buckets)


def _engine(name: str, kind: Kind, labels: str, text: str, buckets: Sequence[float] = ()) -> Spec:
    return Spec(f"slipstream_{name}", kind, Source.ENGINE, tuple(labels.split()), text, buckets)


def _cluster(name: str, kind: Kind, labels: str, text: str) -> Spec:
    return Spec(f"slipstream_{name}", kind, Source.CLUSTER, tuple(labels.split()), text)


_C, _G, _H, _S = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM, Kind.SUMMARY
SPECS: tuple[Spec, ...] = (
    # -- what callers see
    _gateway("http_requests_total", _C, "route method status", "Answered HTTP requests; `route` is a template."),
    _gateway("http_request_duration_seconds", _H, "route", "From arrival to the last byte.", SECONDS),
    _gateway(
        "requests_total",
        _C,
        "model outcome",
        "Calls of base models and adapters: `ok`, `refused` (the caller's), `failed` (ours) or `cancelled`.",
    ),
    _gateway("broken_streams_total", _C, "model", "Streams that ended with an error after their 200."),
    _gateway("time_to_first_token_seconds", _H, "model", "From admission to the first token; streams only.", SECONDS),
    _gateway(
        "time_per_output_token_seconds", _H, "model", "Between later tokens, a mean of each stream.", TOKEN_SECONDS
    ),
    _gateway("prompt_tokens_total", _C, "model", "Prompt tokens of finished calls."),
    _gateway("cached_prompt_tokens_total", _C, "model", "Of these, tokens whose keys and values were there already."),
    _gateway("completion_tokens_total", _C, "model", "Answer tokens of finished choices."),
    _gateway("drafted_tokens_total", _C, "model", "Draft tokens of finished choices."),
    _gateway("accepted_tokens_total", _C, "model", "Of these, tokens that were right."),
    # -- whose
    _gateway(
        "adapter_requests_total", _C, "model adapter outcome", "Calls of an adapter; the busiest 20, and `other`."
    ),
    _gateway("adapter_completion_tokens_total", _C, "model adapter", "Answer tokens of an adapter."),
    _gateway(
        "adapter_time_to_first_token_seconds", _S, "model adapter", "Sum and count: the mean of an adapter's streams."
    ),
    _gateway("adapter_info", _G, "adapter tenant name version", "1; what an adapter's short digest is called."),
    _gateway("tenant_requests_total", _C, "tenant outcome", "Calls by a tenant; the busiest 50, and `other`."),
    _gateway("tenant_tokens_total", _C, "tenant kind", "Tokens that a tenant used: `prompt` or `completion`."),
    _gateway(
        "tenant_rejections_total",
        _C,
        "tenant reason",
        "429s: `overloaded`, or which part of the quota was used up: `requests_per_minute`, `tokens_per_minute`, "
        "`concurrent_requests`, `tokens_per_month`.",
    ),
    _gateway(
        "tenant_quota_used_ratio",
        _G,
        "tenant quota",
        "Share of a quota that was used when this gateway last asked; the same quotas, without the concurrent one.",
    ),
    # -- what stands behind a gateway
    _gateway("registry_up", _G, "", "1 when the registry answered this gateway at the scrape."),
    _gateway("registry_errors_total", _C, "", "Commands that the registry did not answer."),
    _gateway("unsettled_requests", _G, "", "Ended calls whose usage is not yet in the registry."),
    _gateway("lost_usage_requests_total", _C, "", "Ended calls whose usage could not be kept."),
    _gateway("publishes_total", _C, "outcome", "Uploads in one form: `new`, `existing`, `rejected` or `failed`."),
    _gateway("imports_total", _C, "state", "Imports that ended: `ready` or `rejected`."),
    _gateway("webhook_deliveries_total", _C, "outcome", "Tries to deliver an event: `delivered` or `failed`."),
    # -- an engine replica
    _engine("engine_running_sequences", _G, "", "Sequences that hold KV blocks."),
    _engine("engine_waiting_sequences", _G, "", "Sequences that wait, for room or for their adapter."),
    _engine("engine_oldest_wait_seconds", _G, "", "How long the sequence has waited that waits longest for room."),
    _engine("engine_queue_wait_seconds", _H, "", "From arrival in the engine to the first step, by sequence.", SECONDS),
    _engine("engine_sequences_total", _C, "", "Sequences that came: a call's choices."),
    _engine("engine_steps_total", _C, "", "Steps that computed something."),
    _engine("engine_step_duration_seconds", _H, "", "What the model's part of a step took.", STEP_SECONDS),
    _engine("engine_batch_sequences", _H, "", "Sequences of a step.", SEQUENCES),
    _engine("engine_budget_fill_ratio", _H, "", "Token rows of a step, of `max_batched_tokens`.", RATIOS),
    _engine("engine_preemptions_total", _C, "", "Sequences whose blocks were taken for an older one."),
    _engine("engine_prompt_tokens_total", _C, "", "Prompt tokens of ended sequences."),
    _engine("engine_completion_tokens_total", _C, "", "Answer tokens of ended sequences."),
    _engine("engine_drafted_tokens_total", _C, "", "Draft tokens of ended sequences."),
    _engine("engine_accepted_tokens_total", _C, "", "Of these, tokens that were right."),
    _engine("engine_prefix_hit_tokens_total", _C, "", "Prompt tokens found in the prefix cache."),
    _engine("engine_kv_blocks", _G, "", "Blocks of the KV cache."),
    _engine("engine_kv_blocks_used", _G, "", "Of these, blocks that sequences hold."),
    _engine("engine_adapters", _G, "residency", "Adapters by where they are: `fetching`, `on_host`, `on_device`, …"),
    _engine("engine_adapter_slots", _G, "", "Adapters that fit on the device."),
    _engine("engine_adapter_slots_free", _G, "", "Slots that no running sequence holds."),
    _engine("engine_adapters_wanted", _G, "", "Adapters of waiting sequences that are in no slot."),
    _engine("engine_adapter_fetches_total", _C, "outcome", "Adapters fetched to the host: `ok`, `failed`, `late`."),
    _engine("engine_adapter_fetch_duration_seconds", _H, "", "Download, check and layout of an adapter.", SECONDS),
    _engine("engine_adapter_loads_total", _C, "outcome", "Adapters copied into a slot: `ok` or `failed`."),
    _engine("engine_adapter_evictions_total", _C, "tier", "Adapters that left a slot (`device`) or memory (`host`)."),
    _engine(
        "adapter_drafts_judged_total",
        _C,
        "adapter position",
        f"Drafts compared with a token; `position` counts from 1, {MAX_POSITION} is all from there on.",
    ),
    _engine("adapter_drafts_accepted_total", _C, "adapter position", "Of these, drafts that were right."),
    _engine("engine_ranks", _G, "", "Processes that share the replica."),
    _engine("engine_ranks_up", _G, "", "Of these, processes that answered at the scrape."),
    # -- the cluster
    _cluster(
        "replica_up", _G, "role model replica", "1 when a replica answered the scrape; 0 when Serve says it runs."
    ),
    _cluster("replicas", _G, "model state", "Engine replicas by Serve's state: `running`, `starting`, …"),
    _cluster("replicas_desired", _G, "model", "Engine replicas that there are to be."),
    _cluster("replicas_max", _G, "model", "Engine replicas that there may be."),
    _cluster(
        "scaling_decisions_total",
        _C,
        "model direction cause",
        "Changes of the target: `up` or `down`, by `rate`, `queue_wait`, `slot_pressure`, `held`, `idle`, `limits`.",
    ),
)
_BY_NAME = {spec.name: spec for spec in SPECS}


def spec_of(name: str) -> Spec:
    """By its name without `slipstream_`."""
    return _BY_NAME[f"slipstream_{name}"]


def _made(name: str, kind: Kind) -> Spec:
    spec = spec_of(name)
    assert spec.kind is kind, f"{name} is a {spec.kind}"
    return spec


def counter(name: str, registry: CollectorRegistry) -> Counter:
    """In a registry."""
    spec = _made(name, Kind.COUNTER)
    return Counter(spec.name, spec.help, spec.labels, registry=registry)


def histogram(name: str, registry: CollectorRegistry) -> Histogram:
    """In a registry."""
    spec = _made(name, Kind.HISTOGRAM)
    return Histogram(spec.name, spec.help, spec.labels, registry=registry, buckets=spec.buckets)


def counter_family(name: str) -> CounterMetricFamily:
    """Empty, for a collector to fill."""
    spec = _made(name, Kind.COUNTER)
    return CounterMetricFamily(spec.family, spec.help, labels=spec.labels)


def gauge_family(name: str) -> GaugeMetricFamily:
    """Empty, for a collector to fill."""
    spec = _made(name, Kind.GAUGE)
    return GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)


def summary_family(name: str) -> SummaryMetricFamily:
    """Empty, for a collector to fill."""
    spec = _made(name, Kind.SUMMARY)
    return SummaryMetricFamily(spec.name, spec.help, labels=spec.labels)


def metrics_table() -> str:
    """All of them as a Markdown table; `docs/operations/metrics.md` carries it and a test compares."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for spec in SPECS:
        labels = ", ".join(f"`{label}`" for label in spec.all_labels)
        secret = " *" if spec.private else ""
        rows.append(f"| `{spec.name}`{secret} | {spec.kind} | {labels} | {spec.help} |")
    return "\n".join(rows) + "\n"
