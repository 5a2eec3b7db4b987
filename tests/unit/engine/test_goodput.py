"""Draft lengths: the best there are for what rows cost and drafts are worth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.goodput import (
    LEAST_GAIN,
    LEVELS,
    PROBE_EVERY,
    DraftWish,
    FullDrafts,
    GoodputDrafts,
    RowCosts,
    StreamWorth,
)

FREE_ROWS = RowCosts((1, 2, 512), (10.0, 10.0, 10.0), (1.0, 1.0, 1.0))  # all time is waiting for memory
DEAR_ROWS = RowCosts((1, 2, 512), (1.0, 2.0, 512.0), (0.1, 0.2, 51.2))  # all time is arithmetic
KNEE = RowCosts((1, 16, 32, 64, 128, 256), (14.0, 16.0, 30.0, 60.0, 120.0, 240.0), (0.4, 0.5, 0.8, 1.5, 3.0, 6.0))
GOOD, MIDDLING, USELESS = (0.95, 0.85, 0.75), (0.6, 0.5, 0.4), (0.0, 0.0, 0.0)


def worth(chances: Sequence[float], steps: int = 400) -> StreamWorth:
    """Of an adapter whose streams made drafts as likely as this, every time."""
    known = StreamWorth()
    for _ in range(steps):
        known.observe(list(accumulate(chances, mul)), len(chances))
    return known


def chains(*chances: Sequence[float]) -> list[list[float]]:
    """Survivals of chains whose drafts have these chances."""
    return [list(accumulate(own, mul)) for own in chances]


@pytest.mark.parametrize("policy", [FullDrafts(), GoodputDrafts(FREE_ROWS)])
def test_where_rows_are_free_everybody_drafts_all_they_may(policy: FullDrafts | GoodputDrafts) -> None:
    good = worth(GOOD)
    assert policy.streams([DraftWish(good, 3), DraftWish(good, 1), DraftWish(good, 0)], 3) == [3, 1, 0]
    assert policy.keep(chains(GOOD, GOOD[:1], ()), 3) == [3, 1, 0]


def test_where_rows_are_dear_nobody_drafts() -> None:
    policy = GoodputDrafts(DEAR_ROWS)
    assert policy.streams([DraftWish(worth(MIDDLING), 3)] * 4, 4) == [0] * 4
    assert policy.keep(chains(*[MIDDLING] * 4), 4) == [0] * 4


def test_nothing_to_decide() -> None:
    policy = GoodputDrafts(KNEE)
    assert policy.streams([], 1) == []
    assert policy.keep([], 1) == []
    assert policy.keep([[], []], 2) == [0, 0]


def test_streams_run_where_they_are_worth_most() -> None:
    policy = GoodputDrafts(KNEE)
    wishes = [DraftWish(known, 3) for known in map(worth, (GOOD, MIDDLING, USELESS)) for _ in range(2)]
    lengths = policy.streams(wishes, len(wishes))
    good, middling, useless = (sum(lengths[i : i + 2]) for i in (0, 2, 4))
    assert good >= middling > useless == 0


def test_the_likeliest_drafts_are_kept() -> None:
    """Whoever's they are: chains of the same adapter are not cut alike."""
    policy = GoodputDrafts(KNEE)
    kept = policy.keep(chains(*[(0.97, 0.95, 0.1)] * 6, *[(0.1, 0.99, 0.99)] * 6), 12)
    assert kept == [2] * 6 + [0] * 6


def test_drafts_become_fewer_with_load() -> None:
    policy = GoodputDrafts(KNEE)
    loads, chances = (1, 4, 8, 16, 32, 64), (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
    kept = [sum(policy.keep(chains(*[chances] * n), n)) / n for n in loads]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] >= 3 > kept[-1]
    runs = [GoodputDrafts(KNEE).streams([DraftWish(worth(chances), 7)] * n, n)[0] for n in loads]
    assert runs == sorted(runs, reverse=True)
    assert runs[0] >= 3 > runs[-1]


def test_sequences_whose_prompts_come_first_count_as_load() -> None:
    """Eight decode while 24 others' prompts are computed: soon there are 32, and a token is worth what it is then."""
    policy, offered = GoodputDrafts(KNEE), chains(*[MIDDLING] * 8)
    assert sum(policy.keep(offered, 32)) < sum(policy.keep(offered, 8))


def test_streams_that_are_right_now_and_then_run_for_those_times() -> None:
    """An average would not: half the drafts are certain, the others hopeless, and only the certain ones are verified."""
    known = StreamWorth()
    for i in range(400):
        known.observe([0.98 if i % 2 else 0.02], 1)
    costs = RowCosts((1, 8, 16), (10.0, 10.0, 15.0), (0.01, 0.01, 0.02))
    assert GoodputDrafts(costs).streams([DraftWish(known, 1)] * 8, 8) == [1] * 8
    assert GoodputDrafts(costs).streams([DraftWish(worth((0.5,)), 1)] * 8, 8) == [0] * 8


def test_what_streams_cost_is_counted() -> None:
    rows, decoder, head = (1, 8, 64), (10.0, 10.0, 10.0), (0.1, 0.1, 0.1)
    cheap, dear = RowCosts(rows, decoder, head), RowCosts(rows, decoder, head, guess_s=(2.0, 16.0, 128.0))
    wishes = [DraftWish(worth(MIDDLING), 3)] * 8
    assert GoodputDrafts(cheap).streams(wishes, 8) == [3] * 8
    assert GoodputDrafts(dear).streams(wishes, 8) == [0] * 8


def test_streams_that_pick_from_a_draft_vocabulary_cost_less() -> None:
    rows, decoder, head = (1, 8, 64), (10.0, 10.0, 10.0), (0.1, 0.1, 0.1)
    costs = RowCosts(rows, decoder, head, guess_s=(2.0, 16.0, 128.0), cut_s=head)
    wishes = [DraftWish(worth(MIDDLING), 3, cut=True)] * 8
    assert GoodputDrafts(costs).streams(wishes, 8) == [3] * 8
    dear = [DraftWish(worth(MIDDLING), 3)] * 8
    assert GoodputDrafts(costs).streams(dear, 8) == [0] * 8
    assert GoodputDrafts(costs).streams([*wishes, *dear], 16) == [3] * 8 + [0] * 8


CHANCE = st.floats(0.0, 0.999)
COSTS = st.lists(st.floats(0.01, 100.0), min_size=10, max_size=10)


@given(st.lists(st.lists(CHANCE, max_size=3), min_size=1, max_size=4), COSTS, st.integers(0, 10))
def test_no_other_threshold_promises_more(offered: list[list[float]], times: list[float], others: int) -> None:
    costs = RowCosts(tuple(range(1, 6)), tuple(times[:5]), tuple(times[5:]))
    survivals, sequences = chains(*offered), len(offered) + others
    policy = GoodputDrafts(costs)
    kept = policy.keep(survivals, sequences)

    def goodput(lengths: Sequence[int]) -> float:
        gained = sum(sum(chain[:length]) for chain, length in zip(survivals, lengths, strict=True))
        return (sequences + gained) / costs.step_s(sequences, sum(lengths))

    none = goodput([0] * len(offered))
    hurdle = 1 + LEAST_GAIN * len(offered) / sequences
    best, gain = goodput(kept), 1.0 if sum(kept) else hurdle
    for level in range(LEVELS):
        other = [sum(chance >= level / LEVELS for chance in chain) for chain in survivals]
        assert goodput(other) <= best * gain * (1 + 1e-9)
    assert not sum(kept) or best > none * hurdle * (1 - 1e-9)


def test_streams_pay_for_rows_beside_those_of_copies() -> None:
    """What others copy takes the rows that are nearly free."""
    costs = RowCosts((1, 8, 24, 32), (10.0, 10.1, 10.5, 40.0), (0.01, 0.01, 0.01, 0.01))

    def lengths(copying: int) -> list[int]:
        policy, wishes = GoodputDrafts(costs), [DraftWish(worth((0.5,)), 1)] * 2
        for _ in range(40):
            policy.keep([[0.99, 0.98, 0.97]] * copying + [[]] * 2, copying + 2)
        return policy.streams(wishes, copying + 2)

    assert lengths(copying=4) == [1, 1]
    assert lengths(copying=6) == [0, 0]


def test_what_an_adapter_found_lately_counts() -> None:
    known = worth(USELESS)
    benefits = [(level + 0.5) / LEVELS for level in range(LEVELS)]
    assert known.gain(0, benefits) < 0.1
    for _ in range(3000):  # its weights are scaled back on the way
        known.observe([0.97], 1)
    assert known.gain(0, benefits) > 0.9
    assert known.gain(1, benefits) < 0.1, "the second stream did not run"


def test_streams_whose_chains_were_cut_gained_nothing() -> None:
    known = StreamWorth()
    for _ in range(400):
        known.observe([0.9], 2)
    benefits = [(level + 0.5) / LEVELS for level in range(LEVELS)]
    assert known.gain(0, benefits) > 0.8
    assert known.gain(1, benefits) < 0.1


def test_what_was_never_tried_again_is_still_remembered() -> None:
    """However many chains pass, of which none had that stream."""
    known, benefits = StreamWorth(), [1.0] * LEVELS
    first = known.gain(3, benefits)
    for _ in range(100_000):
        known.observe([0.9], 1)
    assert known.gain(3, benefits) == first == 1.0


def test_a_few_that_speculate_among_many_that_do_not() -> None:
    """Where drafts cost nothing they need not pay for the others."""
    assert GoodputDrafts(FREE_ROWS).keep(chains(GOOD[:2]), 64) == [2]


def test_steps_without_chains_say_nothing_of_chains() -> None:
    policy = GoodputDrafts(KNEE)
    for _ in range(100):
        policy.keep([], 1)
    assert policy.kept == 1.0
    for _ in range(100):
        policy.keep([[], []], 2)
    assert policy.kept < 0.01


def test_the_floor_is_below_what_pays_now() -> None:
    policy = GoodputDrafts(KNEE)
    for sequences in (1, 8, 32, 64):
        (kept,) = policy.keep([[policy.floor(sequences) * 0.99]], sequences)
        assert kept == 0
    assert policy.floor(1) < 0.1 < policy.floor(64)
    assert FullDrafts().floor(64) == 0.0


def test_an_adapter_whose_streams_do_not_run_is_tried_again_now_and_then() -> None:
    policy = GoodputDrafts(KNEE)
    useless, good = worth(USELESS), worth(GOOD)
    wishes = [DraftWish(useless, 3), DraftWish(good, 3), DraftWish(useless, 3)]
    steps = [policy.streams(wishes, 3) for _ in range(4 * PROBE_EVERY)]
    tried = [i for i, lengths in enumerate(steps) if lengths[0] + lengths[2]]
    assert [b - a for a, b in pairwise(tried)] == [PROBE_EVERY] * (len(tried) - 1)
    assert len(tried) == 4
    assert all(steps[i][0] + steps[i][2] == 1 for i in tried)


def test_a_probe_finds_out_that_an_adapter_has_become_good() -> None:
    policy, known = GoodputDrafts(KNEE), worth(USELESS)
    for _ in range(120 * PROBE_EVERY):
        (length,) = policy.streams([DraftWish(known, 3)], 1)
        if length:
            known.observe([0.97, 0.9, 0.85][:length], length)
    assert policy.streams([DraftWish(known, 3)], 1) == [3]


def test_new_sequences_are_decided_on_at_once_and_many_together_now_and_then() -> None:
    policy, good = GoodputDrafts(KNEE), worth(GOOD)
    assert policy.streams([DraftWish(good, 3)], 1) == [3]
    assert policy.streams([DraftWish(good, 3)] * 200, 200) == [0] * 200
    assert policy.streams([DraftWish(good, 3)], 1) == [3]
    assert policy.streams([DraftWish(StreamWorth(), 3)] * 2, 2)[0] > 0


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = RowCosts((1, 4, 8), (10.0, 16.0, 30.0), (1.0, 1.0, 2.0))
    assert costs.step_s(1, 0) == 11.0
    assert costs.step_s(1, 1) == 13.0
    assert costs.step_s(4, 4) == 30.0 + 2.0
    assert costs.step_s(12, 0) == 44.0 + 3.0
    assert costs.streams_s(6) == costs.streams_s(6, cut=True) == 1.5
    assert RowCosts((1, 4), (10.0, 16.0), (1.0, 1.0), cut_s=(0.2, 0.8)).streams_s(2, cut=True) == pytest.approx(0.4)


TIME = st.floats(0.001, 10.0)


@given(st.lists(st.tuples(TIME, TIME, TIME), min_size=2, max_size=7), st.integers(1, 9))
def test_costs_never_fall_however_disturbed_the_measurement(
    measured: list[tuple[float, float, float]], sequences: int
) -> None:
    decoder, head, alone = zip(*measured, strict=True)
    costs = RowCosts(tuple(2**i for i in range(len(measured))), decoder, head, alone)
    steps = [costs.step_s(sequences, drafts) for drafts in range(2 ** len(measured) + 4)]
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(steps))  # but for the last bit
    assert all(a <= b for a, b in zip(costs.decoder_s, decoder, strict=True))


def test_sequences_cost_what_they_do_alone_and_drafts_what_rows_do_together() -> None:
    costs = RowCosts((1, 8, 16), (10.0, 12.0, 16.0), (1.0, 1.0, 1.0), alone_s=(10.0, 20.0, 40.0))
    assert costs.step_s(8, 0) == 21.0
    assert costs.step_s(8, 8) == 25.0
    assert costs.step_s(1, 7) == 13.0


@given(st.lists(st.lists(CHANCE, max_size=6), max_size=20), st.integers(0, 1 << 30))
def test_any_load_is_decided(offered: list[list[float]], seed: int) -> None:
    policy, rng = GoodputDrafts(KNEE), random.Random(seed)
    for _ in range(5):
        own = [chain for chain in offered if rng.random() < 0.7]
        wishes = [DraftWish(worth(chain, 1), rng.randrange(4)) for chain in own]
        sequences = max(1, len(own) + rng.randrange(3))
        assert all(0 <= n <= wish.most for n, wish in zip(policy.streams(wishes, sequences), wishes, strict=True))
        assert all(0 <= n <= len(chain) for n, chain in zip(policy.keep(chains(*own), sequences), own, strict=True))
        assert 0.0 <= policy.floor(sequences) < 1.0
        assert policy.kept >= 0.0
