"""Tenants share a busy engine by what they were given, whoever asks for more; nobody waits longer than turns are long."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scripted import ScriptedRunner

from slipstream.engine.blocks import BlockPool
from slipstream.engine.fairness import REMEMBERED, FairShare
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence
from slipstream.engine.waiting import Gate
from slipstream.errors import Overloaded
from slipstream.protocol import EngineStats, GenerateRequest, Queued, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
IDLE = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {})


def sequence(seq_id: int, tenant: str, tokens: int = 5, answer: int = 10, weight: float = 1.0) -> Sequence:
    prompt = [5 + seq_id % 50] * tokens
    return Sequence(seq_id, tenant, GREEDY, prompt, tokens, tokens + answer, frozenset(), weight=weight)


def engine(max_num_seqs: int = 4) -> tuple[Scheduler, ScriptedRunner]:
    own = Scheduler(BlockPool(400, 4), ResidencyManager(1, 1 << 20), max_batched_tokens=256, max_num_seqs=max_num_seqs)
    own.prefix_caching = False
    return own, ScriptedRunner(4)


def step(own: Scheduler, runner: ScriptedRunner, served: Counter[str], tenants: dict[int, str]) -> None:
    plan = own.schedule()
    for emission in own.commit(plan, runner.run(plan)):
        served[tenants[emission.seq_id]] += len(emission.tokens)
    own.check_integrity()


@given(
    weights=st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=2, max_size=4),
    answers=st.lists(st.integers(2, 30), min_size=4, max_size=4),
    bursts=st.lists(st.integers(60, 90), min_size=4, max_size=4),
)
def test_while_all_wait_each_gets_its_share(weights: list[float], answers: list[int], bursts: list[int]) -> None:
    """Whatever the lengths of their answers and of their queues: shares differ by what one batch may hold."""
    own, runner = engine()
    tenants: dict[int, str] = {}
    for i, weight in enumerate(weights):
        for _ in range(bursts[i]):
            seq_id = len(tenants)
            tenants[seq_id] = f"t{i}"
            own.add(sequence(seq_id, f"t{i}", answer=answers[i], weight=weight))
    served: Counter[str] = Counter()
    queued = Counter(tenants.values())
    while True:
        step(own, runner, served, tenants)
        waiting = Counter(seq.tenant for seq in own.waiting)
        if len(waiting) < len(weights):
            break
        work = {
            f"t{i}": (served[f"t{i}"] + 0.2 * 5 * (queued[f"t{i}"] - waiting[f"t{i}"])) / weight
            for i, weight in enumerate(weights)
        }
        assert max(work.values()) - min(work.values()) <= 4 * 31 + 1


def test_a_burst_does_not_hold_up_another_tenants_request() -> None:
    """It starts when the first of those that run ends, and not after the hundred that came before it."""
    own, runner = engine(max_num_seqs=2)
    tenants = dict.fromkeys(range(100), "burst")
    for seq_id in range(100):
        own.add(sequence(seq_id, "burst"))
    served: Counter[str] = Counter()
    for _ in range(5):
        step(own, runner, served, tenants)
    own.add(sequence(100, "quiet"))
    tenants[100] = "quiet"
    steps = 0
    while not served["quiet"]:
        step(own, runner, served, tenants)
        steps += 1
    assert steps <= 11  # an answer has ten tokens


def next_tenant(shares: FairShare, *waiting: Sequence) -> str:
    found = next(shares.order(waiting)).tenant
    assert shares.ranked(waiting)[0].tenant == found
    return found


def test_who_comes_back_has_not_saved_up_turns_and_has_lost_none() -> None:
    shares = FairShare()
    busy, late = sequence(2, "busy"), sequence(1, "late")
    shares.enter("busy", 1.0, [])
    shares.start("busy", 1000.0)
    shares.enter("busy", 1.0, [])  # one more, that waits
    shares.enter("late", 1.0, [busy])  # was idle for all of it
    shares.charge("late", 10.0)
    assert next_tenant(shares, late, busy) == "busy"
    shares.leave("late")
    shares.enter("late", 1.0, [busy])
    assert next_tenant(shares, late, busy) == "busy"


def test_a_stream_that_goes_on_all_day_saves_up_no_turns() -> None:
    """Only who waits is owed anything: a tenant with something running has had what it asked for."""
    shares = FairShare()
    shares.enter("quiet", 1.0, [])
    shares.start("quiet", 10.0)
    for _ in range(100):
        shares.enter("busy", 1.0, [])
        shares.start("busy", 10.0)
        shares.charge("busy", 1000.0)
        shares.leave("busy")
    shares.enter("busy", 1.0, [])
    waiting = [sequence(1, "busy")]
    turns = Counter[str]()
    for i in range(20):
        shares.enter("quiet", 1.0, waiting)
        waiting.append(sequence(10 + i, "quiet"))
    for i in range(20):
        shares.enter("busy", 1.0, waiting)
        waiting.append(sequence(40 + i, "busy"))
    for seq in shares.order(waiting):
        turns[seq.tenant] += 1
        shares.start(seq.tenant, 100.0)
        if sum(turns.values()) == 20:
            break
    assert min(turns["busy"], turns["quiet"]) >= 5, turns


def test_begun_answers_come_first_and_priorities_count_within_a_tenant() -> None:
    """Else a tenant that calls all of its requests urgent would take everybody's turns."""
    shares = FairShare()
    for tenant in ("a", "b"):
        shares.enter(tenant, 1.0, [])
    shares.charge("a", 100.0)
    plain, usual, urgent, begun = sequence(1, "b"), sequence(2, "a"), sequence(3, "a"), sequence(4, "a")
    urgent.priority, begun.preemptions = -100, 1
    waiting = sorted([plain, usual, urgent, begun], key=lambda seq: seq.turn)
    assert [seq.seq_id for seq in shares.order(waiting)] == [4, 1, 3, 2]
    assert [seq.seq_id for seq in shares.ranked(waiting)] == [4, 1, 3, 2]


def test_counters_of_tenants_that_left_are_bounded() -> None:
    shares = FairShare()
    shares.enter("here", 1.0, [])
    for i in range(2 * REMEMBERED):
        shares.enter(f"t{i}", 1.0, [])
        shares.leave(f"t{i}")
    assert len(shares._used) <= REMEMBERED + 2
    assert next_tenant(shares, sequence(1, "here")) == "here"


def request(tenant: str, **fields: object) -> GenerateRequest:
    return replace(GenerateRequest("r", tenant, GREEDY, text="x"), **fields)  # type: ignore[arg-type]


def test_a_full_queue_has_room_for_who_has_less_than_a_share() -> None:
    gate = Gate(max_open=12, max_wait_s=10)
    gate.check(request("burst"), 1, {"burst": 11}, IDLE)
    with pytest.raises(Overloaded):
        gate.check(request("burst"), 1, {"burst": 12}, IDLE)
    gate.check(request("quiet"), 1, {"burst": 12}, IDLE)
    gate.check(request("quiet"), 6, {"burst": 12}, IDLE)
    with pytest.raises(Overloaded):
        gate.check(request("quiet"), 7, {"burst": 12}, IDLE)
    with pytest.raises(Overloaded):
        gate.check(request("quiet"), 5, {"burst": 12, "quiet": 2}, IDLE)


def test_however_many_tenants_come_there_are_never_twice_as_many_as_the_limit() -> None:
    gate, open_ = Gate(max_open=320, max_wait_s=10), {"burst": 320}
    for i in range(200):
        try:
            while True:
                gate.check(request(f"t{i}"), 1, open_, IDLE)
                open_[f"t{i}"] = open_.get(f"t{i}", 0) + 1
        except Overloaded:
            continue
    assert sum(open_.values()) == 640


@pytest.mark.parametrize(
    ("tenant", "weight", "waits_s"), [("burst", 1.0, 41), ("quiet", 1.0, 2), ("heavy", 4.0, 1.5), ("light", 0.5, 3)]
)
def test_the_wait_that_is_expected_is_that_of_the_tenants_own_turn(tenant: str, weight: float, waits_s: float) -> None:
    """40 of a burst wait, and one starts a second."""
    stats = replace(
        IDLE, waiting=40, queue=(Queued("burst", 1.0, 0, 30), Queued("burst", 1.0, -9, 10)), starts_per_s=1.0
    )
    asked = request(tenant, weight=weight)
    gate = Gate(max_open=100, max_wait_s=waits_s + 1.01)
    gate.check(asked, 1, {"burst": 40}, stats)
    with pytest.raises(Overloaded):
        Gate(max_open=100, max_wait_s=waits_s - 0.51).check(asked, 1, {"burst": 40}, stats)
