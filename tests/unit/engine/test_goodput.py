"""Draft lengths: the best there are for what rows cost and drafts are worth, checked against every other choice."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.goodput import (
    ADAPTERS_KEPT,
    LEAST_GAIN,
    PRIOR,
    PROBE_EVERY,
    DraftWish,
    FullDrafts,
    GoodputDrafts,
    RowCosts,
)

FREE_ROWS = RowCosts((1, 2, 512), (10.0, 10.0, 10.0), (1.0, 1.0, 1.0))  # all time is waiting for memory
DEAR_ROWS = RowCosts((1, 2, 512), (1.0, 2.0, 512.0), (0.1, 0.2, 51.2))  # all time is arithmetic
KNEE = RowCosts((1, 16, 32, 64, 128, 256), (14.0, 16.0, 30.0, 60.0, 120.0, 240.0), (4.0, 5.0, 8.0, 15.0, 30.0, 60.0))
GOOD, MIDDLING, USELESS = (0.95, 0.85, 0.75), (0.6, 0.5, 0.4), (0.0, 0.0, 0.0)


def taught(costs: RowCosts, **acceptances: Sequence[float]) -> GoodputDrafts:
    """A policy that has seen enough of each adapter."""
    policy = GoodputDrafts(costs)
    rng = random.Random(0)
    for name, chances in acceptances.items():
        for _ in range(2000):
            judged = accepted = 0
            for chance in chances:
                judged += 1
                if rng.random() >= chance:
                    break
                accepted += 1
            policy.observe(name, judged, accepted)
    return policy


def expected_goodput(
    policy: GoodputDrafts, costs: RowCosts, wishes: Sequence[DraftWish], lengths: Sequence[int], rows: int
) -> float:
    gained = 0.0
    for members, chances in policy.classes(wishes):
        for i in members:
            gained += sum(itertools.accumulate(chances[: lengths[i]], operator.mul))
    return (len(wishes) + gained) / costs.step_s(rows, sum(lengths), len(wishes))


@pytest.mark.parametrize("policy", [FullDrafts(), taught(FREE_ROWS, a=GOOD)])
def test_where_rows_are_free_everybody_drafts_all_they_may(policy: FullDrafts | GoodputDrafts) -> None:
    assert policy.lengths([DraftWish("a", 3), DraftWish("a", 1), DraftWish("a", 0)], 3) == [3, 1, 0]


def test_where_rows_are_dear_nobody_drafts() -> None:
    policy = taught(DEAR_ROWS, a=MIDDLING)
    assert policy.lengths([DraftWish("a", 3)] * 4, 4) == [0] * 4


def test_drafts_go_where_they_are_worth_most() -> None:
    policy = taught(KNEE, good=GOOD, middling=MIDDLING, useless=USELESS)
    wishes = [DraftWish(name, 3) for name in ("good", "middling", "useless") for _ in range(2)]
    lengths = policy.lengths(wishes, len(wishes))
    good, middling, useless = (sum(lengths[i : i + 2]) for i in (0, 2, 4))
    assert good > middling > useless == 0


def test_the_draft_length_falls_with_load() -> None:
    policy = taught(KNEE, good=GOOD)
    means = [sum(policy.lengths([DraftWish("good", 7)] * n, n)) / n for n in (1, 4, 8, 16, 32, 64)]
    assert means == sorted(means, reverse=True)
    assert means[0] >= 3 > means[-1]


def test_a_long_prompt_in_the_step_makes_drafts_worth_their_rows() -> None:
    """Whoever must wait for 200 rows anyway had better get more than one token for it."""
    policy = taught(KNEE, middling=MIDDLING)
    wishes = [DraftWish("middling", 3)] * 32
    assert sum(policy.lengths(wishes, 32 + 200)) > sum(policy.lengths(wishes, 32))


def test_requests_that_are_as_good_as_equal_draft_alike() -> None:
    """One must not pay for another's rows because its adapter was estimated a hundredth lower."""
    policy = taught(KNEE, **{f"a{i}": (0.74 + 0.005 * i, 0.85, 0.9) for i in range(8)})
    for n in (2, 8, 16, 32):
        lengths = policy.lengths([DraftWish(f"a{i % 8}", 3) for i in range(n)], n)
        assert len(set(lengths)) == 1


CHANCE = st.floats(0.0, 1.0)
COSTS = st.lists(st.floats(0.01, 100.0), min_size=10, max_size=10)


@given(
    chances=st.lists(st.tuples(CHANCE, CHANCE, CHANCE), min_size=1, max_size=3),
    mosts=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    decoder=COSTS,
    extra=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_no_other_choice_promises_more(
    chances: list[tuple[float, ...]], mosts: list[int], decoder: list[float], extra: int, seed: int
) -> None:
    costs = RowCosts(tuple(range(1, 6)), tuple(decoder[:5]), tuple(decoder[5:]))
    policy = GoodputDrafts(costs)
    rng = random.Random(seed)
    for i, triple in enumerate(chances):
        for _ in range(20):
            accepted = next((j for j, c in enumerate(triple) if rng.random() >= c), 3)
            policy.observe(str(i), min(accepted + 1, 3), accepted)
    wishes = [DraftWish(str(i), most) for i, most in zip(range(len(chances)), mosts, strict=False)]
    rows = len(wishes) + extra
    lengths = policy.lengths(wishes, rows)
    best = expected_goodput(policy, costs, wishes, lengths, rows)
    assert all(0 <= k <= wish.most for k, wish in zip(lengths, wishes, strict=True))
    gain = 1 + (LEAST_GAIN if not sum(lengths) else 0)
    classes = policy.classes(wishes)
    assert sorted(i for members, _ in classes for i in members) == list(range(len(wishes)))
    alike = len({len(members) for members, _ in classes}) == len({wish.most for wish in wishes}) == 1
    for each in itertools.product(range(4), repeat=len(classes)):
        if not alike and len(classes) > 1:
            break  # offers of different sizes are taken by their worth, which is not always the best packing
        other = [0] * len(wishes)
        for (members, _), length in zip(classes, each, strict=True):
            for i in members:
                other[i] = min(length, wishes[i].most)
        assert expected_goodput(policy, costs, wishes, other, rows) <= best * gain * (1 + 1e-9)
    none = expected_goodput(policy, costs, wishes, [0] * len(wishes), rows)
    assert not sum(lengths) or best > none * (1 + LEAST_GAIN) * (1 - 1e-9)


def test_what_was_never_judged_is_believed_a_little() -> None:
    policy = GoodputDrafts(KNEE)
    assert policy.acceptance("new", 3) == (PRIOR,) * 3
    for _ in range(200):
        policy.observe("new", 1, 0)  # the second draft is never judged
    first, second, third = policy.acceptance("new", 3)
    assert first < 0.1
    assert second == third == PRIOR


def test_acceptance_follows_what_changed() -> None:
    policy = taught(KNEE, a=GOOD)
    assert policy.acceptance("a", 1)[0] > 0.9
    for _ in range(500):
        policy.observe("a", 1, 0)
    assert policy.acceptance("a", 1)[0] < 0.1


def test_an_adapter_that_gets_no_drafts_is_tried_again_now_and_then() -> None:
    policy = taught(KNEE, useless=USELESS, good=GOOD)
    wishes = [DraftWish("useless", 3), DraftWish("good", 3), DraftWish("useless", 3)]
    steps = [policy.lengths(wishes, 3) for _ in range(4 * PROBE_EVERY)]
    tried = [i for i, lengths in enumerate(steps) if lengths[0] + lengths[2]]
    assert [b - a for a, b in itertools.pairwise(tried)] == [PROBE_EVERY] * (len(tried) - 1)
    assert len(tried) == 4
    assert all(steps[i][0] + steps[i][2] == 1 for i in tried)


def test_a_probe_finds_out_that_an_adapter_has_become_good() -> None:
    policy = taught(KNEE, a=USELESS)
    for _ in range(60 * PROBE_EVERY):
        (length,) = policy.lengths([DraftWish("a", 3)], 1)
        if length:
            policy.observe("a", length, length)
    assert policy.lengths([DraftWish("a", 3)], 1) == [3]


def test_memory_of_adapters_is_bounded() -> None:
    policy = taught(KNEE, first=USELESS)
    for i in range(ADAPTERS_KEPT):
        policy.observe(str(i), 1, 1)
    assert policy.acceptance("first", 1) == (PRIOR,)  # forgotten
    assert policy.acceptance(str(ADAPTERS_KEPT - 1), 1)[0] > PRIOR


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = RowCosts((1, 4, 8), (10.0, 16.0, 30.0), (1.0, 1.0, 2.0))
    assert costs.step_s(1, 0, 1) == 11.0
    assert costs.step_s(2, 0, 1) == 13.0
    assert costs.step_s(4, 4, 4) == 30.0 + 2.0 + 1.0  # decoder of 8, head of 8, head of 4 drafts
    assert costs.step_s(12, 0, 1) == 44.0 + 1.0


@given(st.lists(st.tuples(st.floats(0.001, 10.0), st.floats(0.001, 10.0)), min_size=2, max_size=9))
def test_costs_never_fall_however_disturbed_the_measurement(measured: list[tuple[float, float]]) -> None:
    decoder, head = zip(*measured, strict=True)
    costs = RowCosts(tuple(2**i for i in range(len(measured))), decoder, head)
    steps = [costs.step_s(n, 0, 1) for n in range(1, 2 ** len(measured) + 5)]
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(steps))  # but for the last bit
    assert all(a <= b for a, b in zip(costs.decoder_s, decoder, strict=True))
