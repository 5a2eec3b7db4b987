"""Chains of drafts: the likelier proposal at each position, and what is learnt of all of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.chains import MARGINS, PRIOR_WEIGHT, Beliefs, agreed, copied, streamed
from slipstream.engine.copying import LONGEST_MATCH, NOTHING, Copied
from slipstream.engine.plan import Pick

SURE, UNSURE = 9.0, 0.1


def test_evidence_tells_apart_what_differs() -> None:
    first = {streamed(0, margin) for margin in range(MARGINS)}
    later = {streamed(1, margin) for margin in range(MARGINS)}
    copies = {copied(length) for length in range(1, LONGEST_MATCH + 1)}
    both = {agreed(margin) for margin in range(MARGINS)}
    assert len(first | later | copies | both) == 2 * MARGINS + LONGEST_MATCH + len(both)
    assert sorted(first | later | copies | both) == list(range(len(Beliefs().chances)))


@pytest.mark.parametrize("margin", [0.0, 0.99, 7.5, 8.0, 1e9, math.inf, math.nan])
def test_any_margin_is_evidence(margin: float) -> None:
    chances = Beliefs().chances
    assert 0.0 < chances[streamed(0, margin)] < 1.0
    assert 0.0 < chances[agreed(margin)] < 1.0


def test_streams_alone_make_their_own_chain() -> None:
    chain = Beliefs().chain([Pick(5, SURE), Pick(6, UNSURE), Pick(7, SURE)])
    assert chain.tokens == [5, 6, 7]
    assert chain.gains == pytest.approx(chain.survivals)
    assert Beliefs().chain([Pick(5, SURE), Pick(6, SURE)], most=1).tokens == [5]
    assert Beliefs().chain([]).tokens == []


def test_copies_alone_make_their_own_chain() -> None:
    chain = Beliefs().chain([], Copied(3, [1, 2, 3, 4]))
    assert chain.tokens == [1, 2, 3, 4]
    assert chain.gains == []


def test_where_both_say_the_same_a_draft_is_likelier() -> None:
    beliefs = Beliefs()
    (alone,) = beliefs.chain([Pick(5, UNSURE)]).survivals
    (both,) = beliefs.chain([Pick(5, UNSURE)], Copied(1, [5])).survivals
    assert both > alone


def test_the_likelier_one_wins_and_the_other_is_followed_no_further() -> None:
    copy = Copied(8, [1, 2, 3])
    assert Beliefs().chain([Pick(5, SURE), Pick(6, SURE)], copy).tokens == [5, 6]
    assert Beliefs().chain([Pick(5, UNSURE), Pick(6, SURE)], copy).tokens == [1, 2, 3]
    assert Beliefs().chain([Pick(1, UNSURE), Pick(6, SURE)], copy).tokens == [1, 6]


def test_streams_gain_what_copies_would_not_have_found() -> None:
    beliefs = Beliefs()
    chain = beliefs.chain([Pick(1, SURE), Pick(9, UNSURE)], Copied(4, [1, 2]))
    assert chain.gains[0] == pytest.approx(beliefs.chances[agreed(SURE)] - beliefs.chances[copied(4)])
    assert chain.gains[1] == pytest.approx(chain.survivals[1] - beliefs.chances[copied(4)] * beliefs.chances[copied(5)])


def test_what_is_hopeless_is_not_offered_but_judged() -> None:
    beliefs = Beliefs()
    chain = beliefs.chain([Pick(5, UNSURE), Pick(6, SURE)], floor=0.9)
    assert chain.tokens == []
    before = beliefs.chances[streamed(0, UNSURE)]
    beliefs.learn(chain, [5])
    assert beliefs.chances[streamed(0, UNSURE)] > before


def test_every_proposal_is_judged_where_the_chain_was_right_before() -> None:
    beliefs = Beliefs()
    guesses, copy = [Pick(1, UNSURE), Pick(2, SURE), Pick(3, SURE)], Copied(6, [7, 8, 9])
    chain = beliefs.chain(guesses, copy)
    assert chain.tokens == [7, 8, 9]
    fresh = Beliefs().chances
    beliefs.learn(chain, [1])  # the stream was right, the copy was not; what came after says nothing
    assert beliefs.chances[streamed(0, UNSURE)] > fresh[streamed(0, UNSURE)]
    assert beliefs.chances[copied(6)] < fresh[copied(6)]
    changed = [i for i, (a, b) in enumerate(zip(beliefs.chances, fresh, strict=True)) if a != b]
    assert sorted(changed) == sorted([streamed(0, UNSURE), copied(6)])


def test_chances_follow_what_changed_and_are_never_certain() -> None:
    beliefs = Beliefs()
    for right, low, high in ((True, 0.9, 1.0), (False, 0.0, 0.1), (True, 0.9, 1.0)):
        for _ in range(2000):
            beliefs.observe(3, right)
        assert low <= beliefs.chances[3] <= high
        assert 0.0 < beliefs.chances[3] < 1.0


def test_a_prior_counts_for_a_few_judgements() -> None:
    beliefs = Beliefs()
    prior = beliefs.chances[2]
    beliefs.observe(2, True)
    assert beliefs.chances[2] == pytest.approx((prior * PRIOR_WEIGHT + 1) / (PRIOR_WEIGHT + 1))


TOKEN = st.integers(0, 2)


@given(
    st.lists(st.builds(Pick, TOKEN, st.floats(0, 12)), max_size=6),
    st.builds(Copied, st.integers(1, 20), st.lists(TOKEN, min_size=1, max_size=8)) | st.just(NOTHING),
    st.integers(0, 8),
    st.floats(0, 0.99),
    st.lists(TOKEN, min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, 33), st.booleans()), max_size=60),
)
def test_any_chain(
    guesses: list[Pick], copy: Copied, most: int, floor: float, said: list[int], seen: list[tuple[int, bool]]
) -> None:
    beliefs = Beliefs()
    for evidence, right in seen:
        beliefs.observe(evidence, right)
    chain = beliefs.chain(guesses, copy, most, floor)
    assert len(chain.tokens) == len(chain.survivals) <= min(most, max(len(guesses), len(copy.tokens)))
    assert all(a >= b for a, b in pairwise([1.0, *chain.survivals]))
    assert all(survival >= floor for survival in chain.survivals)
    assert len(chain.gains) == min(len(chain.tokens), len(guesses))
    assert all(0.0 <= gain <= survival for gain, survival in zip(chain.gains, chain.survivals, strict=False))
    for position, token in enumerate(chain.tokens):
        proposed = [own[position] for own in ([g.token for g in guesses], copy.tokens) if position < len(own)]
        assert token in proposed
    beliefs.learn(chain, said)
    assert all(0.0 < chance < 1.0 for chance in beliefs.chances)
