"""The prefix cache as the scheduler uses it: what is computed once, what is copied, and what is nobody else's."""

from __future__ import annotations

from support.schedules import BLOCK, AlwaysThere, expected_answer, make_scheduler, make_seq, run
from support.scripted import ScriptedRunner

from slipstream.engine.blocks import BlockPool
from slipstream.engine.scheduler import Scheduler


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler, runner = make_scheduler(), ScriptedRunner(BLOCK)
    prompt = list(range(1, 18))
    first, second = make_seq(1, prompt), make_seq(2, prompt)
    scheduler.add(first)
    run(scheduler, runner)
    scheduler.add(second)
    run(scheduler, runner)
    assert second.cached_prompt == 16
    assert first.tokens == second.tokens


def test_a_prompt_that_leaves_a_block_in_its_middle_starts_from_a_copy_of_it() -> None:
    """As all prompts of an adapter do, whose template ends anywhere."""
    scheduler, runner = make_scheduler(), ScriptedRunner(BLOCK)
    template = list(range(1, 11))
    seqs = [make_seq(i, [*template, 20 + i, 30 + i], max_tokens=4) for i in range(3)]
    for seq in seqs:
        scheduler.add(seq)
        run(scheduler, runner)
    assert [seq.cached_prompt for seq in seqs] == [0, 10, 10]
    assert [seq.tokens[12:] for seq in seqs] == [expected_answer(seq.tokens[:12], 4) for seq in seqs]


def test_a_prompt_within_the_first_block_and_one_asked_again_compute_what_is_new() -> None:
    scheduler, runner = make_scheduler(), ScriptedRunner(BLOCK)
    first, other, again = ([1, 2, 3], [1, 2, 9], [1, 2, 3])
    cached = []
    for i, prompt in enumerate((first, other, again)):
        seq = make_seq(i, prompt, max_tokens=6)
        scheduler.add(seq)
        run(scheduler, runner)
        cached.append(seq.cached_prompt)
    assert cached == [0, 2, 2], "the last token is always computed"


def started_with_one_block(num_blocks: int) -> tuple[Scheduler, ScriptedRunner]:
    """Whose only cached block is the first, with tokens 1 2 3 4."""
    scheduler, runner = make_scheduler(num_blocks=num_blocks), ScriptedRunner(BLOCK)
    scheduler.add(make_seq(0, [1, 2, 3, 4], max_tokens=1))
    run(scheduler, runner)
    return scheduler, runner


def test_a_block_that_is_copied_may_be_handed_out_in_the_same_step() -> None:
    scheduler, runner = started_with_one_block(2)
    alike, other = make_seq(1, [1, 2, 9], max_tokens=1), make_seq(2, [7, 7, 7], max_tokens=1)
    scheduler.add(alike)
    scheduler.add(other)
    plan = scheduler.schedule()
    (copy,) = plan.copies
    assert [part.blocks for part in plan.sequences] == [(copy.target,), (copy.source,)]
    scheduler.commit(plan, runner.run(plan))
    assert alike.tokens[3:] == expected_answer([1, 2, 9], 1)
    assert other.tokens[3:] == expected_answer([7, 7, 7], 1)


def test_several_sequences_copy_one_block_and_one_is_preempted_before_it_is_full() -> None:
    scheduler, runner = started_with_one_block(5)
    seqs = [make_seq(i, [1, 2, 8 + i], max_tokens=12) for i in (1, 2)]
    for seq in seqs:
        scheduler.add(seq)
    plan = scheduler.schedule()
    assert len(plan.copies) == len({copy.target for copy in plan.copies}) == 2
    assert len({copy.source for copy in plan.copies}) == 1
    scheduler.commit(plan, runner.run(plan))
    scheduler._preempt(seqs[1])
    run(scheduler, runner)
    assert seqs[1].preemptions >= 1
    for seq in seqs:
        assert seq.tokens[3:] == expected_answer(seq.tokens[:3], 12)


def test_less_than_a_quarter_of_a_block_is_computed_rather_than_copied() -> None:
    scheduler, runner = Scheduler(BlockPool(8, 16), AlwaysThere(), 64, 4), ScriptedRunner(16)
    for i, (alike, cached) in enumerate([(16, 0), (3, 0), (4, 4)]):
        seq = make_seq(i, [*range(1, alike + 1), 30 + i, 40], max_tokens=1)
        scheduler.add(seq)
        run(scheduler, runner)
        assert seq.cached_prompt == cached


def test_other_tenants_and_adapters_blocks_are_not_copied() -> None:
    scheduler, runner = make_scheduler(), ScriptedRunner(BLOCK)
    prompt = [1, 2, 3, 4, 5, 6]
    for i, (tenant, adapter) in enumerate([("t", None), ("u", None), ("t", "a"), ("t", None)]):
        seq = make_seq(i, prompt, max_tokens=6, tenant=tenant, adapter=adapter)
        scheduler.add(seq)
        run(scheduler, runner)
        assert seq.cached_prompt == (5 if i == 3 else 0)


def test_the_prompt_of_an_answer_of_one_token_is_reused_as_well() -> None:
    scheduler, runner = make_scheduler(num_blocks=40, budget=64), ScriptedRunner(BLOCK)
    prompt = list(range(5, 5 + 3 * BLOCK + 1))
    scheduler.add(make_seq(1, prompt, max_tokens=1))
    run(scheduler, runner)
    scheduler.add(make_seq(2, prompt, max_tokens=1))
    assert [len(part.tokens) for part in scheduler.schedule().sequences] == [1]
