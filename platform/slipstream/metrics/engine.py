"""What one engine replica counts: told by the engine as an `EngineObserver`, and read from its `EngineStats`."""

from __future__ import annotations

import time
from collections import Counter as Counted
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slipstream.engine.observer import AdapterMove, EngineObserver, FetchOutcome, StepFacts
from slipstream.metrics.catalogue import MAX_POSITION, counter, counter_family, gauge_family, histogram
from slipstream.metrics.pages import Page, Process, page_of
from slipstream.metrics.top import TopLabels, short_digest
from slipstream.protocol import EngineStats

TOP_ADAPTERS = 20
_STATS_COUNTERS: Mapping[str, Callable[[EngineStats], float]] = {
    "engine_sequences_total": lambda s: s.sequences,
    "engine_steps_total": lambda s: s.steps,
    "engine_preemptions_total": lambda s: s.preemptions,
    "engine_prompt_tokens_total": lambda s: s.prompt_tokens,
    "engine_completion_tokens_total": lambda s: s.completion_tokens,
    "engine_drafted_tokens_total": lambda s: s.drafted_tokens,
    "engine_accepted_tokens_total": lambda s: s.accepted_tokens,
    "engine_prefix_hit_tokens_total": lambda s: s.prefix_hit_tokens,
}
_STATS_GAUGES: Mapping[str, Callable[[EngineStats], float]] = {
    "engine_running_sequences": lambda s: s.running,
    "engine_waiting_sequences": lambda s: s.waiting,
    "engine_oldest_wait_seconds": lambda s: s.queue_wait_s,
    "engine_kv_blocks": lambda s: s.kv_blocks_total,
    "engine_kv_blocks_used": lambda s: s.kv_blocks_total - s.kv_blocks_free,
    "engine_adapter_slots": lambda s: s.adapter_slots,
    "engine_adapter_slots_free": lambda s: s.slots_free,
    "engine_adapters_wanted": lambda s: s.adapters_wanted,
}
RESIDENCIES = ("fetching", "on_host", "on_device", "draining", "failed")


class EngineMetrics(EngineObserver):
    """One replica's registry. Counters of adapters are for the busiest; see `top.py`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, top_adapters: int = TOP_ADAPTERS) -> None:
        self._registry = own = CollectorRegistry()
        self._top = TopLabels(top_adapters, clock, name=short_digest)
        self._queue_wait = histogram("engine_queue_wait_seconds", own)
        self._step = histogram("engine_step_duration_seconds", own)
        self._batch = histogram("engine_batch_sequences", own)
        self._fill = histogram("engine_budget_fill_ratio", own)
        self._fetches = counter("engine_adapter_fetches_total", own)
        self._fetch_s = histogram("engine_adapter_fetch_duration_seconds", own)
        loads, evictions = (
            counter("engine_adapter_loads_total", own),
            counter("engine_adapter_evictions_total", own),
        )
        # Made here: a series that begins with its first event shows no increase then.
        self._moves = {
            AdapterMove.LOADED: loads.labels("ok"),
            AdapterMove.LOAD_FAILED: loads.labels("failed"),
            AdapterMove.EVICTED: evictions.labels("device"),
            AdapterMove.DROPPED: evictions.labels("host"),
        }
        for outcome in FetchOutcome:
            self._fetches.labels(outcome)
        self._drafts = _Drafts(self._top, own)
        ProcessCollector(registry=own)

    # -- the engine's side ----------------------------------------------------------------------------------------

    def stepped(self, facts: StepFacts) -> None:
        """Three histograms."""
        self._step.observe(facts.seconds)
        self._batch.observe(facts.sequences)
        self._fill.observe(facts.tokens / facts.budget)

    def started(self, adapter: str | None, waited_s: float) -> None:
        """Its wait, and one more use of its adapter."""
        self._queue_wait.observe(waited_s)
        if adapter is not None:
            self._top.note(adapter)

    def judged(self, adapter: str, judged: int, accepted: int) -> None:
        """Acceptance by position."""
        self._drafts.note(adapter, judged, accepted)

    def moved(self, move: AdapterMove) -> None:
        """Loads and evictions."""
        self._moves[move].inc()

    def fetched(self, outcome: FetchOutcome, seconds: float) -> None:
        """Fetches, and how long the good ones took."""
        self._fetches.labels(outcome).inc()
        if outcome is FetchOutcome.OK:
            self._fetch_s.observe(seconds)

    # -- the scrape's side ----------------------------------------------------------------------------------------

    def page(self, process: Process, stats: EngineStats, ranks: int = 1, ranks_up: int = 1) -> Page:
        """All of it, now."""
        page = page_of(process, self._registry)
        return Page(process, (*page.families, *_families(stats), *_rank_families(ranks, ranks_up)))


def _families(stats: EngineStats) -> Iterator[Metric]:
    for name, of in _STATS_COUNTERS.items():
        counted = counter_family(name)
        counted.add_metric([], of(stats))
        yield counted
    for name, of in _STATS_GAUGES.items():
        measured = gauge_family(name)
        measured.add_metric([], of(stats))
        yield measured
    tiers, found = gauge_family("engine_adapters"), Counted(stats.adapters.values())
    for residency in dict.fromkeys((*RESIDENCIES, *found)):
        tiers.add_metric([residency], found[residency])
    yield tiers


def _rank_families(ranks: int, ranks_up: int) -> Iterator[GaugeMetricFamily]:
    for name, value in (("engine_ranks", ranks), ("engine_ranks_up", ranks_up)):
        family = gauge_family(name)
        family.add_metric([], value)
        yield family


class _Drafts(Collector):
    """Judged and accepted drafts by adapter and position. A step counts pairs, a scrape adds up what they mean."""

    def __init__(self, top: TopLabels, registry: CollectorRegistry) -> None:
        self._top = top
        self._pairs: defaultdict[str, Counted[tuple[int, int]]] = defaultdict(Counted)
        top.on_forget(lambda label: self._pairs.pop(label, None))
        registry.register(self)

    def note(self, adapter: str, judged: int, accepted: int) -> None:
        """One sequence's drafts of one step."""
        self._pairs[self._top.label(adapter)][judged, accepted] += 1

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For the registry."""
        families = tuple(self.describe())
        for label, counted in list(self._pairs.items()):
            pairs = counted.copy()  # the step thread goes on counting
            most = max((judged for judged, _ in pairs), default=0)
            for which, family in enumerate(families):
                lengths = Counted[int]()
                for pair, count in pairs.items():
                    lengths[pair[which]] += count
                for position in range(1, min(most, MAX_POSITION) + 1):
                    family.add_metric([label, str(position)], _at_position(lengths, position))
        yield from families

    def describe(self) -> Iterator[CounterMetricFamily]:
        """What `collect` will give."""
        yield counter_family("adapter_drafts_judged_total")
        yield counter_family("adapter_drafts_accepted_total")


def _at_position(lengths: Mapping[int, int], position: int) -> int:
    """Drafts at a position, of so many runs of each length from the first position on; at the last, all from there on."""
    last = position == MAX_POSITION
    return sum(
        count * (length - position + 1 if last else 1) for length, count in lengths.items() if length >= position
    )
