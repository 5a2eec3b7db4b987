"""The scheduler against a runner that reads its KV through the block tables: text must not depend on the schedule."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedules import BLOCK, AlwaysThere, expected_answer, make_scheduler, make_seq, run
from support.scripted import ScriptedRunner

from slipstream.engine.blocks import BlockPool
from slipstream.engine.drafting import Drafting
from slipstream.engine.goodput import GoodputDrafts, RowCosts
from slipstream.engine.pacing import CHUNK_STEP, FIRST_CHUNK, PromptPacer
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence, SequenceState
from slipstream.protocol import FinishReason, SamplingParams

FUZZ_EXAMPLES = int(os.environ.get("SLIPSTREAM_FUZZ_EXAMPLES", "150"))


def test_one_step_holds_decodes_then_chunks_within_the_budget() -> None:
    scheduler, runner = make_scheduler(budget=10), ScriptedRunner(BLOCK)
    scheduler.add(make_seq(1, [5, 6]))
    plan = scheduler.schedule()
    scheduler.commit(plan, runner.run(plan))
    scheduler.add(make_seq(2, list(range(1, 31))))
    plan = scheduler.schedule()
    assert [(s.seq_id, len(s.tokens), s.samples) for s in plan.sequences] == [(1, 1, True), (2, 9, False)]


def test_drafts_never_take_another_decodes_token() -> None:
    scheduler, runner = make_scheduler(budget=4, seqs=4), ScriptedRunner(BLOCK, accept=1.0)
    for i in range(1, 5):
        scheduler.add(make_seq(i, [i], max_tokens=20, adapter="a", draft_cap=3))
    run(scheduler, runner)
    assert max(runner.tokens_per_step) <= 4


def test_the_newest_is_preempted_and_its_text_stays() -> None:
    scheduler, runner = make_scheduler(num_blocks=6), ScriptedRunner(BLOCK)
    seqs = [make_seq(i, [10 + i, 20 + i, 30 + i], max_tokens=16) for i in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    run(scheduler, runner)
    assert seqs[0].preemptions == 0
    assert sum(s.preemptions for s in seqs) > 0
    for seq in seqs:
        assert seq.tokens[3:] == expected_answer(seq.tokens[:3], 16)


def test_an_abort_frees_blocks_and_pins_at_once_in_every_state() -> None:
    scheduler, runner = make_scheduler(num_blocks=8, seqs=1), ScriptedRunner(BLOCK)
    pins = scheduler.adapters
    assert isinstance(pins, AlwaysThere)
    scheduler.add(make_seq(1, [1, 2, 3, 4, 5], adapter="a"))
    scheduler.add(make_seq(2, [1, 2], adapter="a"))
    plan = scheduler.schedule()
    scheduler.commit(plan, runner.run(plan))
    scheduler.abort(2)
    scheduler.abort(1)
    scheduler.abort(99)
    assert scheduler.pool.num_free == 8
    assert pins.pins == 0
    assert not scheduler.has_work


def test_stops_drop_the_accepted_tail() -> None:
    scheduler, runner = make_scheduler(), ScriptedRunner(BLOCK, accept=1.0)
    prompt = [7, 8, 9]
    answer = expected_answer(prompt, 30)
    stop = answer[4]
    seq = make_seq(1, prompt, max_tokens=30, adapter="a", draft_cap=3)
    seq.params = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(stop,))
    scheduler.add(seq)
    run(scheduler, runner)
    assert seq.tokens[3:] == answer[: answer.index(stop) + 1]
    assert seq.finish_reason is FinishReason.STOP
    assert seq.decode_steps < len(answer)
    assert seq.accepted <= seq.drafted


def test_tokens_per_step_counts_the_step_that_ends_prefill() -> None:
    scheduler, runner = make_scheduler(budget=8), ScriptedRunner(BLOCK, vocab=10_000)
    seq = make_seq(1, list(range(1, 21)), max_tokens=5)
    scheduler.add(seq)
    run(scheduler, runner)
    assert (seq.num_answer, seq.decode_steps) == (5, 5)


def first_step(scheduler: Scheduler, runner: ScriptedRunner, seq: Sequence) -> None:
    """One sequence, up to its first token."""
    scheduler.add(seq)
    plan = scheduler.schedule()
    scheduler.commit(plan, runner.run(plan))


def test_a_long_prompt_takes_the_pacers_rows_and_short_ones_all_they_need() -> None:
    scheduler, runner = make_scheduler(num_blocks=200, budget=100), ScriptedRunner(BLOCK)
    scheduler.pacer = PromptPacer(2.0)
    first_step(scheduler, runner, make_seq(1, [5, 6]))
    scheduler.add(make_seq(2, [7] * 300))
    scheduler.add(make_seq(3, [8] * 200))  # long too, and the first long one has taken the room
    scheduler.add(make_seq(4, [9] * 30))
    plan = scheduler.schedule()
    assert [(s.seq_id, len(s.tokens)) for s in plan.sequences] == [(1, 1), (2, FIRST_CHUNK), (4, 30)]
    scheduler.observe(plan, 0.050)  # a short prompt in between: not learnt from
    scheduler.commit(plan, runner.run(plan))
    scheduler.pacer.observe(2, 0, 0, 0.010)
    for _ in range(20):
        scheduler.pacer.observe(2, scheduler.pacer.rows(), 0, 0.050)
    plan = scheduler.schedule()
    assert [(s.seq_id, len(s.tokens)) for s in plan.sequences] == [(1, 1), (4, 1), (2, CHUNK_STEP)]
    run(scheduler, runner)


def test_without_anybody_to_wait_a_long_prompt_takes_the_whole_budget() -> None:
    scheduler = make_scheduler(num_blocks=200, budget=200)
    scheduler.pacer = PromptPacer(2.0)
    scheduler.add(make_seq(1, [7] * 300))
    assert [len(s.tokens) for s in scheduler.schedule().sequences] == [192]  # an aligned chunk of 200


def test_a_long_prompt_that_is_mostly_cached_or_was_preempted_is_not_paced() -> None:
    """One step is all that it needs, or a client waits in the middle of its answer."""
    scheduler, runner = make_scheduler(num_blocks=400, budget=100), ScriptedRunner(BLOCK)
    scheduler.add(make_seq(1, [7] * 300))
    run(scheduler, runner)
    scheduler.pacer = PromptPacer(2.0)
    first_step(scheduler, runner, make_seq(2, [5, 6], max_tokens=60))
    scheduler.add(make_seq(3, [8] * 300))
    scheduler.add(make_seq(4, [7] * 300 + [9] * 20))
    plan = scheduler.schedule()
    assert [(s.seq_id, len(s.tokens)) for s in plan.sequences] == [(2, 1), (3, FIRST_CHUNK), (4, 20)]
    scheduler.commit(plan, runner.run(plan))
    preempted = make_seq(5, [9] * 150, preemptions=1)
    scheduler.abort(3)
    scheduler.add(preempted)
    assert [(s.seq_id, len(s.tokens)) for s in scheduler.schedule().sequences][-1] == (5, 64)  # aligned, all that fits


def test_what_a_step_took_is_told_by_decodes_and_prompt_rows() -> None:
    scheduler, runner = make_scheduler(num_blocks=200, budget=100), ScriptedRunner(BLOCK)
    scheduler.pacer = PromptPacer(2.0)
    first_step(scheduler, runner, make_seq(1, [5, 6], max_tokens=60))
    plan = scheduler.schedule()
    scheduler.observe(plan, 0.064)
    scheduler.commit(plan, runner.run(plan))
    scheduler.add(make_seq(2, [7] * 300))
    plan = scheduler.schedule()
    scheduler.observe(plan, 0.064 * 2 / 0.75)
    assert scheduler.pacer.rows() == 48


@dataclass
class Arrival:
    prompt: list[int]
    max_tokens: int
    at: int
    adapter: str | None
    draft_cap: int
    abort_after: int | None


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        prompt=st.lists(st.integers(1, 5), min_size=1, max_size=30),
        max_tokens=st.integers(1, 24),
        at=st.integers(0, 30),
        adapter=st.sampled_from([None, "a", "b", "c"]),
        draft_cap=st.integers(0, 5),
        abort_after=st.none() | st.integers(0, 25),
    ),
    min_size=1,
    max_size=10,
)


@dataclass
class World:
    """A scheduler with real residency, two slots and adapters that take three steps to arrive."""

    scheduler: Scheduler
    residency: ResidencyManager
    arriving: dict[str, int] = field(default_factory=dict)

    def tick(self, now: int) -> None:
        plan = self.residency.plan(self.scheduler.waiting_adapters())
        for digest in plan.fetch:
            self.arriving[digest] = now + 3
        for digest in [d for d, at in self.arriving.items() if at <= now]:
            del self.arriving[digest]
            self.residency.fetched(digest, 10, {"a": 3, "b": 0, "c": 5}[digest])


@settings(max_examples=FUZZ_EXAMPLES)
@given(
    ARRIVALS, st.integers(14, 40), st.integers(4, 40), st.integers(1, 4), st.floats(0, 1), st.booleans(),
    st.none() | st.floats(1.1, 4.0), st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_traffic_gives_everyone_their_own_text_and_every_block_back(
    arrivals: list[Arrival], blocks: int, budget: int, seqs: int, accept: float, prefix: bool,
    stretch: float | None, times: Random,
) -> None:  # fmt: skip
    residency = ResidencyManager(2, 25, drain_after_ticks=5)
    scheduler = Scheduler(BlockPool(blocks, BLOCK), residency, budget, min(seqs, budget))
    scheduler.prefix_caching = prefix
    scheduler.pacer = PromptPacer(stretch) if stretch is not None else None
    world = World(scheduler, residency)
    runner = ScriptedRunner(BLOCK, accept=accept)
    made: list[tuple[Arrival, Sequence]] = []
    for now in range(4000):
        for i, arrival in enumerate(arrivals):
            if arrival.at == now:
                seq = make_seq(
                    i, arrival.prompt, arrival.max_tokens, adapter=arrival.adapter, draft_cap=arrival.draft_cap
                )
                made.append((arrival, seq))
                scheduler.add(seq)
            if arrival.abort_after is not None and arrival.at + arrival.abort_after == now:
                scheduler.abort(i)
        world.tick(now)
        plan = scheduler.schedule()
        assert plan.num_tokens <= budget
        result = runner.run(plan)
        scheduler.observe(plan, times.uniform(0.001, 0.1))
        scheduler.commit(plan, result)
        scheduler.check_integrity()
        residency.check_integrity()
        if now > 60 and not scheduler.has_work:
            break
    assert not scheduler.has_work, "somebody starved"
    assert scheduler.pool.num_free == blocks
    for arrival, seq in made:
        expected = expected_answer(arrival.prompt, arrival.max_tokens)
        answer = seq.tokens[len(arrival.prompt) :]
        assert seq.state is SequenceState.FINISHED
        assert answer == expected[: len(answer)]
        assert seq.finish_reason is FinishReason.ABORTED or answer == expected


def test_draft_lengths_by_goodput_under_load_that_comes_and_goes() -> None:
    """Some thousand steps of waves, preemptions and aborts: the text is everybody's own, and all of it is given back."""
    costs = RowCosts((1, 4, 8, 16), (10.0, 10.5, 14.0, 26.0), (1.0, 1.1, 1.5, 2.5), guess_s=(0.3, 0.6, 1.0, 2.0))
    scheduler = make_scheduler(num_blocks=40, budget=32, seqs=8)
    scheduler.drafting = Drafting(GoodputDrafts(costs))
    runner, random, made = ScriptedRunner(BLOCK, accept=0.7), Random(0), list[Sequence]()
    for step in range(4000):
        wave = 1 if step // 300 % 2 else 7
        if step < 3500 and scheduler.num_waiting + scheduler.num_running < wave:
            adapter = random.choice([None, "a", "b"])
            prompt = [random.randint(1, 6) for _ in range(random.randint(1, 24))]
            made.append(make_seq(step, prompt, random.randint(1, 30), adapter=adapter, draft_cap=random.randint(0, 8)))
            scheduler.add(made[-1])
        if made and random.random() < 0.01:
            scheduler.abort(random.choice(made).seq_id)
        plan = scheduler.schedule()
        scheduler.commit(plan, runner.run(plan))
        scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 40
    assert sum(seq.accepted for seq in made) > 500
    assert any(seq.preemptions for seq in made)
    for seq in made:
        expected = expected_answer(seq.tokens[: seq.prompt_len], seq.max_total - seq.prompt_len)
        answer = seq.tokens[seq.prompt_len :]
        assert answer == expected[: len(answer)]
        assert seq.finish_reason is FinishReason.ABORTED or answer == expected
        assert seq.copy_index is None


def test_sequences_that_wait_for_blocks_do_not_count_as_load() -> None:
    scheduler, runner = make_scheduler(num_blocks=4, budget=32), ScriptedRunner(BLOCK)
    for i in range(6):
        scheduler.add(make_seq(i, [1 + i] * 10, max_tokens=4))
    asked: list[int] = []
    scheduler.drafting.choose = lambda decodes, at_work: asked.append(at_work)  # type: ignore[method-assign]
    for _ in range(3):
        plan = scheduler.schedule()
        scheduler.commit(plan, runner.run(plan))
    assert asked == [0, 1, 1]
    scheduler = make_scheduler(num_blocks=40, budget=10)
    for i in range(6):
        scheduler.add(make_seq(i, [1 + i] * 10, max_tokens=4))
    scheduler.drafting.choose = lambda decodes, at_work: asked.append(at_work)  # type: ignore[method-assign]
    for _ in range(2):
        plan = scheduler.schedule()
        scheduler.commit(plan, runner.run(plan))
    assert asked[-1] == 6, "these wait for rows only"
