"""Chains of drafts: the likelier proposal at each position, and what is learnt of all of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.chains import (
    MARGINS,
    NUM_EVIDENCE,
    PRIOR_WEIGHT,
    Beliefs,
    agreed,
    contradicted,
    matched,
    streamed,
)
from slipstream.engine.copying import LONGEST_MATCH, NOTHING, Copied
from slipstream.engine.plan import Pick

SURE, UNSURE = 9.0, 0.1


def test_evidence_tells_apart_what_differs() -> None:
    streams = [streamed(i, margin, other) for i in (0, 1) for margin in range(MARGINS) for other in (False, True)]
    copies = [kind(length) for kind in (matched, contradicted) for length in range(1, LONGEST_MATCH + 1)]
    both = {agreed(margin) for margin in range(MARGINS)}
    assert sorted([*streams, *copies, *both]) == list(range(NUM_EVIDENCE))
    assert streamed(2, 1.0) == streamed(1, 1.5)
    assert matched(LONGEST_MATCH) == matched(LONGEST_MATCH + 5)


@pytest.mark.parametrize("margin", [0.0, 0.99, 7.5, 8.0, 1e9, math.inf, math.nan])
def test_any_margin_is_evidence(margin: float) -> None:
    assert 0.0 < Beliefs().chance(streamed(0, margin)) < 1.0
    assert 0.0 < Beliefs().chance(agreed(margin)) < 1.0


def test_streams_alone_make_their_own_chain() -> None:
    chain = Beliefs().chain([Pick(5, SURE), Pick(6, UNSURE), Pick(7, SURE)])
    assert chain.tokens == [5, 6, 7]
    assert chain.gains == pytest.approx(chain.survivals)
    assert Beliefs().chain([Pick(5, SURE), Pick(6, SURE)], most=1).tokens == [5]
    assert Beliefs().chain([]).tokens == []
    assert Beliefs().chain([Pick(5, SURE), Pick(6, SURE)], most=1).ran == 1


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
    assert chain.tokens == [1, 2], "the second stream is unsure, and the copy is followed"
    assert chain.gains[0] == pytest.approx(beliefs.chance(agreed(SURE)) - beliefs.chance(matched(4)))
    assert chain.gains[1] == 0.0


def test_that_streams_say_what_copies_say_is_not_their_gain() -> None:
    """Copies are right as often as they are, whoever agrees with them."""
    beliefs = Beliefs()
    for i in range(400):  # they agree and are right, or differ and the copy is wrong
        beliefs.learn(beliefs.chain([Pick(1, SURE)], Copied(4, [1 if i % 4 else 2])), [1])
    assert beliefs.chance(matched(4)) == pytest.approx(0.75, abs=0.05)
    assert beliefs.chance(contradicted(4)) < 0.2
    (gain,) = beliefs.chain([Pick(1, SURE)], Copied(4, [1])).gains
    assert gain == pytest.approx(0.25, abs=0.07)


def test_what_is_hopeless_is_not_offered_but_judged() -> None:
    beliefs = Beliefs()
    chain = beliefs.chain([Pick(5, UNSURE), Pick(6, SURE)], floor=0.9)
    assert chain.tokens == []
    assert chain.gains == beliefs.chain([Pick(5, UNSURE), Pick(6, SURE)]).gains
    before = beliefs.chance(streamed(0, UNSURE))
    beliefs.learn(chain, [5])
    assert beliefs.chance(streamed(0, UNSURE)) > before


def test_every_proposal_is_judged_where_the_chain_was_right_before(monkeypatch: pytest.MonkeyPatch) -> None:
    beliefs = Beliefs()
    guesses, copy = [Pick(1, UNSURE), Pick(2, SURE), Pick(3, SURE)], Copied(6, [7, 8, 9])
    chain = beliefs.chain(guesses, copy)
    assert chain.tokens == [7, 8, 9]
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(Beliefs, "observe", lambda self, evidence, right: seen.append((evidence, right)))
    beliefs.learn(chain, [1])  # the stream was right, the copy was not; what came after says nothing
    stream = streamed(0, UNSURE, contradicted=True)
    assert seen == [(stream, True), (contradicted(6), False), (matched(6), False)]
    seen.clear()
    beliefs.learn(chain, [7, 8])
    assert seen == [(stream, False), (contradicted(6), True), (matched(6), True), (matched(7), True)]


def test_chances_follow_what_changed_and_are_never_certain() -> None:
    beliefs = Beliefs()
    for right, low, high in ((True, 0.9, 1.0), (False, 0.0, 0.1), (True, 0.9, 1.0)):
        for _ in range(2000):
            beliefs.observe(3, right)
        assert low <= beliefs.chance(3) <= high
        assert 0.0 < beliefs.chance(3) < 1.0


def test_a_prior_counts_for_a_few_judgements() -> None:
    beliefs = Beliefs()
    prior = beliefs.chance(2)
    beliefs.observe(2, True)
    assert prior < beliefs.chance(2) < prior + 1.5 / (PRIOR_WEIGHT + 1)


def test_a_useless_speculator_is_known_for_one_before_every_margin_was_seen() -> None:
    beliefs, unseen = Beliefs(), streamed(0, SURE)
    before, copies = beliefs.chance(unseen), beliefs.chance(matched(3))
    for _ in range(20):
        beliefs.observe(streamed(0, UNSURE), False)
        beliefs.observe(streamed(0, 2.5), False)
    assert beliefs.chance(unseen) < before / 4
    assert beliefs.chance(matched(3)) == copies


TOKEN = st.integers(0, 2)


@given(
    st.lists(st.builds(Pick, TOKEN, st.floats(0, 12)), max_size=6),
    st.builds(Copied, st.integers(1, 20), st.lists(TOKEN, min_size=1, max_size=8)) | st.just(NOTHING),
    st.integers(0, 8),
    st.floats(0, 0.99),
    st.lists(TOKEN, min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, NUM_EVIDENCE - 1), st.booleans()), max_size=60),
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
    assert len(chain.gains) <= chain.ran <= len(guesses)
    assert all(0.0 <= gain <= survival for gain, survival in zip(chain.gains, chain.survivals, strict=False))
    assert len(chain.claims) <= len(chain.tokens) + 1
    assert beliefs.chain(guesses, copy, most).gains == chain.gains, "whatever is offered"
    for position, token in enumerate(chain.tokens):
        proposed = [own[position] for own in ([g.token for g in guesses], copy.tokens) if position < len(own)]
        assert token in proposed
    beliefs.learn(chain, said)
    assert all(0.0 < beliefs.chance(evidence) < 1.0 for evidence in range(NUM_EVIDENCE))
