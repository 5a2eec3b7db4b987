"""Waits: how they are predicted, who goes first, and who is told that it would take too long."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scripted import ScriptedRunner

from slipstream.engine.blocks import BlockPool
from slipstream.engine.core import EngineCore
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence, SequenceState
from slipstream.engine.waiting import StartRate, predicted_wait_s
from slipstream.protocol import Queued, SamplingParams
from slipstream.testing import ManualClock


def test_without_a_queue_nothing_is_known() -> None:
    rate = StartRate()
    rate.observe(0.0, waiting=0, started=0, running=8)
    rate.observe(5.0, waiting=0, started=50, running=8)
    assert rate.per_s is None
    assert predicted_wait_s(10, rate.per_s) == 0.0


def test_starts_are_counted_while_others_wait() -> None:
    rate = StartRate()
    rate.observe(0.0, waiting=3, started=100, running=8)
    rate.observe(0.5, waiting=3, started=101, running=8)
    assert rate.per_s is None, "too short to mean anything"
    rate.observe(2.0, waiting=3, started=104, running=8)
    assert rate.per_s == pytest.approx(2.0)
    assert predicted_wait_s(10, rate.per_s) == pytest.approx(5.0)
    rate.observe(3.0, waiting=0, started=110, running=8)
    assert rate.per_s is None, "the queue is gone, and what was known of it"


def test_the_window_forgets() -> None:
    rate = StartRate()
    for second in range(60):
        rate.observe(float(second), waiting=1, started=second if second < 30 else 30 + 5 * (second - 30), running=8)
    assert rate.per_s == pytest.approx(5.0)


def test_a_queue_that_has_not_moved_yet_is_as_fast_as_its_batch_may_be() -> None:
    """Long answers: that none has ended says only that they take longer than this."""
    rate = StartRate()
    rate.observe(0.0, waiting=3, started=8, running=8)
    rate.observe(4.0, waiting=3, started=8, running=8)
    assert rate.per_s == pytest.approx(2.0)
    for second in range(5, 41):
        rate.observe(float(second), waiting=3, started=8, running=8)
    assert rate.per_s == pytest.approx(0.2)
    assert predicted_wait_s(6, rate.per_s) == pytest.approx(30.0)
    assert predicted_wait_s(0, 0.0) == 0.0


def sequence(seq_id: int, priority: int = 0, start_by: float | None = None, tokens: int = 3) -> Sequence:
    params = SamplingParams(temperature=0.0)
    return Sequence(
        seq_id, "t", params, [5] * tokens, tokens, tokens + 8, frozenset(), priority=priority, start_by=start_by
    )


def scheduler(max_num_seqs: int = 1) -> Scheduler:
    return Scheduler(BlockPool(64, 4), ResidencyManager(1, 1 << 20), max_batched_tokens=64, max_num_seqs=max_num_seqs)


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=12))
def test_lower_priorities_start_first_and_equals_in_order(priorities: list[int]) -> None:
    own = scheduler()
    for seq_id, priority in enumerate(priorities):
        own.add(sequence(seq_id, priority))
    order = []
    while own.has_work:
        (part,) = own.schedule().sequences
        order.append(part.seq_id)
        own.abort(part.seq_id)
    assert order == sorted(range(len(priorities)), key=lambda seq_id: (priorities[seq_id], seq_id))


def test_who_waits_past_its_time_is_overdue_and_who_has_begun_is_not() -> None:
    own = scheduler()
    begun, late, patient = sequence(1, start_by=1.0), sequence(2, start_by=5.0), sequence(3)
    for seq in (begun, late, patient):
        own.add(seq)
    own.schedule()
    assert own.overdue(4.0) == []
    assert own.overdue(5.0) == [late]
    preempted = sequence(4, start_by=1.0)
    preempted.preemptions = 1
    own.add(preempted)
    assert own.overdue(9.0) == [late], "its client is in the middle of an answer"


def test_the_queue_is_of_those_that_wait_for_room_and_nothing_else() -> None:
    """Neither an adapter on its way nor a preempted answer is a reason to refuse others, or to start replicas."""
    clock, residency = ManualClock(0.0), ResidencyManager(1, 1 << 20)
    own = Scheduler(BlockPool(64, 4), residency, max_batched_tokens=64, max_num_seqs=1)
    core = EngineCore[Any](own, residency, cast("Any", ScriptedRunner(4)), clock)
    for seq_id, arrived in ((1, 0.0), (2, 3.0), (3, 7.0)):
        seq = sequence(seq_id, priority=seq_id)
        seq.arrived = arrived
        core.add(seq)
    fetching, preempted = sequence(4), sequence(5)
    fetching.adapter, preempted.preemptions = "sha256:x", 1
    core.add(fetching)
    core.add(preempted)
    clock.advance(10.0)
    assert core.stats().queue_wait_s == 10.0
    assert core.stats().queue == tuple(Queued("t", 1.0, priority, 1) for priority in (1, 2, 3))
    core.abort(1)
    assert core.stats().queue_wait_s == 7.0
    core.abort(2)
    core.abort(3)
    assert (core.stats().waiting, core.stats().queue_wait_s) == (2, 0.0)


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


@pytest.mark.parametrize("times", [1.5, 3.0, 10.0])
def test_at_several_times_the_capacity_who_is_let_in_waits_within_the_bound(times: float) -> None:
    """Arrivals in virtual time at a multiple of what the engine can do; refusals come at once, the rest starts in time."""
    clock, allowed_s, step_s, answer = ManualClock(0.0), 5.0, 0.05, 20
    residency = ResidencyManager(1, 1 << 20)
    own = Scheduler(BlockPool(512, 4), residency, max_batched_tokens=64, max_num_seqs=8)
    core = EngineCore[Any](own, residency, cast("Any", ScriptedRunner(4)), clock)
    capacity = 8 / (answer * step_s)  # requests a second
    waits, refused, late, started, arrived, debt = list[float](), 0, 0, set[int](), 0, 0.0
    while clock() < 120:
        debt += times * capacity * step_s
        while debt >= 1:
            debt -= 1
            stats = core.stats()
            if predicted_wait_s(sum(queued.count for queued in stats.queue) + 1, stats.starts_per_s) > allowed_s:
                refused += 1
                continue
            arrived += 1
            seq = sequence(arrived, start_by=clock() + allowed_s)
            seq.max_total, seq.arrived = seq.prompt_len + answer, clock()
            core.add(seq)
        outcome = core.step()
        late += len(outcome.overdue)
        for seq_id, seq in core.sequences.items():
            if seq.state is SequenceState.RUNNING and seq_id not in started:
                started.add(seq_id)
                waits.append(clock() - seq.arrived)
        clock.advance(step_s)
    assert p99(waits) <= allowed_s
    assert refused > (times - 1) * capacity * 120 * 0.7, "early"
    assert late < 0.1 * len(waits), "and not after having waited"
    assert len(waits) >= 0.9 * capacity * 120, "the engine stays busy"
