"""What an engine tells its observer, and what becomes of it: a scripted engine, with adapters that come and go."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, cast

import pytest
from support.metrics_page import of, parse, total
from support.scripted import ScriptedRunner

from slipstream.engine.blocks import BlockPool
from slipstream.engine.core import EngineCore
from slipstream.engine.observer import FetchOutcome
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence
from slipstream.metrics.catalogue import MAX_POSITION, SPECS, Source
from slipstream.metrics.engine import EngineMetrics
from slipstream.metrics.pages import Process, render
from slipstream.protocol import SamplingParams
from slipstream.testing import ManualClock

PROCESS = Process("r1", "base")
DIGESTS = [f"sha256:{hashlib.sha256(bytes([i])).hexdigest()}" for i in range(4)]
LABELS = [digest[7:19] for digest in DIGESTS]


@dataclass(frozen=True)
class Prepared:
    """An adapter that is nothing."""

    nbytes: int = 100
    num_streams: int = 3


class Runner(ScriptedRunner):
    """Takes any adapter; the last one does not fit."""

    clock: ManualClock

    def run(self, plan: Any) -> Any:
        self.clock.advance(0.02)
        return super().run(plan)

    def load_adapter(self, slot: int, adapter: object) -> None:
        if adapter is BROKEN:
            raise RuntimeError("out of memory")

    def unload_adapter(self, slot: int) -> None:
        """Nothing to do."""


BROKEN = Prepared(nbytes=1)


class World:
    """An engine with two slots, and host memory for three adapters."""

    def __init__(self, blocks: int = 64) -> None:
        self.clock = ManualClock(100.0)
        self.metrics = EngineMetrics(self.clock)
        runner = Runner(4)
        runner.clock = self.clock
        residency = ResidencyManager(2, 350)
        scheduler = Scheduler(BlockPool(blocks, 4), residency, max_batched_tokens=32, max_num_seqs=8)
        self.core = EngineCore[Any](scheduler, residency, cast("Any", runner), self.clock, self.metrics)
        self.ids = 0
        self.emitted: list[tuple[int, int]] = []  # judged and accepted drafts

    def ask(self, adapter: str | None, prepared: Prepared | None = None, tokens: int = 8) -> None:
        """One sequence, to its end."""
        self.add(adapter, tokens)
        self.finish(prepared)

    def add(self, adapter: str | None, tokens: int) -> None:
        """One sequence."""
        self.ids += 1
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        self.core.add(
            Sequence(
                self.ids, "t", params, [5] * 5, 5, 5 + tokens, frozenset(), adapter=adapter, draft_cap=3,
                arrived=self.clock(),
            )
        )  # fmt: skip

    def finish(self, prepared: Prepared | None = None) -> None:
        """All there are."""
        while self.core.has_work:
            self.clock.advance(0.5)
            outcome = self.core.step()
            self.emitted += [(emission.judged, emission.accepted) for emission in outcome.emissions]
            for digest in outcome.fetch:
                self.core.adapter_ready(digest, prepared or Prepared())

    def page(self) -> Any:
        return parse(render([self.metrics.page(PROCESS, self.core.stats())], (), (), names=True).decode())


def test_steps_waits_and_tokens() -> None:
    world = World()
    world.ask(None)
    page, stats = world.page(), world.core.stats()
    assert total(page, "slipstream_engine_steps_total") == stats.steps > 0
    assert total(page, "slipstream_engine_step_duration_seconds_count") == stats.steps
    assert total(page, "slipstream_engine_step_duration_seconds_sum") == pytest.approx(0.02 * stats.steps)
    assert total(page, "slipstream_engine_batch_sequences_sum") == stats.steps
    assert total(page, "slipstream_engine_budget_fill_ratio_sum") == pytest.approx((5 + 7) / 32)
    assert total(page, "slipstream_engine_queue_wait_seconds_sum") == pytest.approx(0.5)
    assert total(page, "slipstream_engine_completion_tokens_total") == 8
    assert total(page, "slipstream_engine_kv_blocks") == 64
    assert total(page, "slipstream_engine_kv_blocks_used") == 0


def test_a_preempted_sequence_has_waited_but_once() -> None:
    world = World(blocks=12)
    for _ in range(3):
        world.add(None, tokens=20)
    world.finish()
    page = world.page()
    assert total(page, "slipstream_engine_preemptions_total") > 0
    assert total(page, "slipstream_engine_queue_wait_seconds_count") == 3


def test_drafts_are_counted_by_adapter_and_position() -> None:
    world = World()
    for _ in range(10):
        world.ask(DIGESTS[0], tokens=20)
    page = world.page()
    assert max(judged for judged, _ in world.emitted) == 3
    for position in (1, 2, 3):
        for name, which in (("judged", 0), ("accepted", 1)):
            expected = sum(each[which] >= position for each in world.emitted)
            found = total(page, f"slipstream_adapter_drafts_{name}_total", adapter=LABELS[0], position=str(position))
            assert found == expected > 0
    assert total(page, "slipstream_adapter_drafts_judged_total", position="4") == 0


def test_drafts_far_on_share_the_last_position() -> None:
    metrics = EngineMetrics(ManualClock(0.0))
    metrics.started(DIGESTS[0], 0.0)
    metrics.judged(DIGESTS[0], MAX_POSITION + 4, MAX_POSITION + 1)
    metrics.judged(DIGESTS[0], MAX_POSITION, 0)
    page = parse(render([metrics.page(PROCESS, World().core.stats())], (), (), names=True).decode())
    judged = {labels["position"]: value for labels, value in of(page, "slipstream_adapter_drafts_judged_total")}
    accepted = {labels["position"]: value for labels, value in of(page, "slipstream_adapter_drafts_accepted_total")}
    assert judged == {str(p): 2.0 for p in range(1, MAX_POSITION)} | {str(MAX_POSITION): 5.0 + 1.0}
    assert accepted == {str(p): 1.0 for p in range(1, MAX_POSITION)} | {str(MAX_POSITION): 2.0}


def test_adapters_come_and_go() -> None:
    world = World()
    for digest in DIGESTS:
        world.ask(digest)
    page = world.page()
    assert total(page, "slipstream_engine_adapter_loads_total", outcome="ok") == 4
    assert total(page, "slipstream_engine_adapter_evictions_total", tier="device") == 2
    assert total(page, "slipstream_engine_adapter_evictions_total", tier="host") >= 1
    assert total(page, "slipstream_engine_adapters", residency="on_device") == 2
    assert total(page, "slipstream_engine_adapter_slots") == 2
    world.core.residency.doom(DIGESTS[3])
    world.ask(None)
    assert total(world.page(), "slipstream_engine_adapter_evictions_total", tier="device") == 3


def test_what_does_not_fit_is_said() -> None:
    world = World()
    world.ask(DIGESTS[0], BROKEN)
    assert total(world.page(), "slipstream_engine_adapter_loads_total", outcome="failed") == 1
    world.metrics.fetched(FetchOutcome.LATE, 60.0)
    world.metrics.fetched(FetchOutcome.OK, 0.2)
    page = world.page()
    assert total(page, "slipstream_engine_adapter_fetches_total", outcome="late") == 1
    assert total(page, "slipstream_engine_adapter_fetch_duration_seconds_count") == 1


def test_every_metric_of_an_engine_is_on_its_page_with_its_labels() -> None:
    world = World()
    world.ask(DIGESTS[0], tokens=20)
    page = world.page()
    for spec in SPECS:
        if spec.source is Source.ENGINE:
            series = [labels for (name, labels) in page if name in (spec.name, f"{spec.name}_count")]
            assert series, spec.name
            for labels in series:
                assert {name for name, _ in labels} == set(spec.all_labels), spec.name
