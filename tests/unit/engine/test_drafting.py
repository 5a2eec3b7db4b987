"""Speculation as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import Any

import pytest

from slipstream.engine.config import FastPath
from slipstream.engine.drafting import ADAPTERS_KEPT, IDLE_TURNS, Drafting, drafting_of, judge
from slipstream.engine.goodput import DraftWish, FullDrafts, StreamWorth
from slipstream.engine.plan import Pick
from slipstream.engine.sequence import Sequence
from slipstream.protocol import SamplingParams

PROMPT = [7, 8, 9, 1, 2, 7]


def make_seq(seq_id: int = 1, adapter: str | None = "a", cap: int = 8, room: int = 20) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=room)
    return Sequence(seq_id, "t", params, list(PROMPT), 6, 6 + room, frozenset(), adapter=adapter, draft_cap=cap)


def drafts(seq: Sequence) -> list[int]:
    return seq.chain.tokens if seq.chain is not None else []


class Nothing(FullDrafts):
    """Verifies nothing."""

    kept = 0.0

    def keep(self, survivals: Rows[Rows[float]], sequences: int) -> list[int]:
        return [0] * len(survivals)


def test_drafts_come_from_streams_and_from_the_prompt() -> None:
    seq = make_seq()
    drafting = Drafting()
    drafting.choose([seq], 1)
    assert drafts(seq) == [8, 9, 1, 2, 7]
    seq.guesses = (Pick(5, 9.0), Pick(6, 9.0))
    drafting.choose([seq], 1)
    assert drafts(seq) == [5, 6]


@pytest.mark.parametrize(("cap", "room", "most"), [(0, 20, 0), (2, 20, 2), (8, 3, 2), (8, 1, 0)])
def test_never_more_than_the_request_allows_and_the_answer_has_room_for(cap: int, room: int, most: int) -> None:
    seq = make_seq(cap=cap, room=room)
    Drafting().choose([seq], 1)
    assert len(drafts(seq)) == most


def test_the_base_model_copies_as_well() -> None:
    seq = make_seq(adapter=None)
    Drafting().choose([seq], 1)
    assert drafts(seq) == [8, 9, 1, 2, 7]


def test_copies_can_be_turned_off() -> None:
    seq = make_seq()
    drafting = Drafting(copies=False)
    drafting.choose([seq], 1)
    assert drafts(seq) == []
    seq.guesses = (Pick(8, 0.1),)
    drafting.choose([seq], 1)
    assert drafts(seq) == [8]


def test_what_was_learnt_of_one_adapter_is_not_believed_of_another() -> None:
    drafting = Drafting(copies=False)
    one, other = make_seq(1, "a"), make_seq(2, "b")

    def survival(seq: Sequence) -> float:
        seq.guesses = (Pick(5, 3.5),)
        drafting.choose([seq], 1)
        assert seq.chain is not None
        return seq.chain.survivals[0]

    before = survival(other)
    for _ in range(50):
        survival(one)
        drafting.learn(one, [4])
    assert survival(one) < 0.2
    assert survival(other) == before


def test_copies_that_nobody_verifies_are_looked_for_seldom_but_still_judged() -> None:
    drafting = Drafting(Nothing())
    seqs = [make_seq(i) for i in range(IDLE_TURNS)]
    looked = []
    for _ in range(2 * IDLE_TURNS):
        drafting.choose(seqs, 4)
        looked.append([seq.seq_id for seq in seqs if seq.chain is not None])
        for seq in seqs:
            drafting.learn(seq, [8])
    assert [len(ids) for ids in looked] == [1] * len(looked)
    assert {ids[0] for ids in looked} == set(range(IDLE_TURNS))
    seqs[0].guesses = seqs[1].guesses = (Pick(5, 9.0),)  # streams that ran are looked at in any case
    drafting.choose(seqs[:2], 4)
    assert all(seq.chain is not None for seq in seqs[:2])


@pytest.mark.parametrize(
    ("guesses", "said", "counts"),
    [
        ([], [5], (0, 0)),
        ([5], [5], (1, 1)),
        ([6], [5], (1, 0)),
        ([5, 6, 7], [5, 9, 7], (2, 1)),
        ([5, 6, 7], [5, 6], (2, 2)),
        ([5], [5, 6], (1, 1)),
    ],
)
def test_streams_are_judged_by_what_they_said(guesses: list[int], said: list[int], counts: tuple[int, int]) -> None:
    assert judge([Pick(token, 1.0) for token in guesses], said) == counts


def test_what_streams_add_is_learnt_once_a_step() -> None:
    drafting, seq = Drafting(copies=False), make_seq(room=3)
    asked: list[float] = []

    class Watched(StreamWorth):
        def observe(self, gains: Rows[float], ran: int) -> None:
            asked.append(ran)

    drafting._known("a").worth = Watched()
    seq.guesses = tuple(Pick(token, 9.0) for token in (5, 6, 7, 8))
    drafting.choose([seq], 1)
    drafting.choose([seq], 1)  # as when the step had no room for it
    drafting.learn(seq, [5])
    drafting.learn(seq, [5])
    assert asked == [2], "the answer has room for two drafts; of the other streams nothing is known"


def test_streams_are_asked_for_by_adapter() -> None:
    asked: list[Rows[DraftWish]] = []

    class Asking(FullDrafts):
        def streams(self, wishes: Rows[DraftWish], sequences: int) -> list[int]:
            asked.append(wishes)
            return super().streams(wishes, sequences)

    drafting = Drafting(Asking())
    runs = drafting.streams([(make_seq(1, "a"), 3), (make_seq(2, "b"), 2), (make_seq(3, "a"), 1)], 3)
    assert runs == [(3, None), (2, None), (1, None)]
    ((first, second, third),) = asked
    assert first.worth is third.worth is not second.worth


def test_streams_pick_among_what_their_adapter_read_and_said() -> None:
    asked: list[list[bool]] = []

    class Asking(FullDrafts):
        def streams(self, wishes: Rows[DraftWish], sequences: int) -> list[int]:
            asked.append([wish.cut for wish in wishes])
            return super().streams(wishes, sequences)

    drafting = Drafting(Asking(), cut=True)
    first, other = make_seq(1, "a"), make_seq(2, "b")
    assert drafting.streams([(first, 3), (other, 3)], 2) == [(3, None), (3, None)]
    for _ in range(200):
        drafting.learn(first, [30, 31])
        drafting.learn(make_seq(3, None), [32])
    own, others = drafting.streams([(first, 3), (other, 3)], 2)
    assert own.among is not None
    assert list(own.among) == [1, 2, 7, 8, 9, 30, 31]
    assert others.among is None
    assert asked == [[False, False], [True, False]]


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 1.1}, {"logit_bias": {5: 1.0}}, {"min_tokens": 3}],
    ids=lambda each: next(iter(each)),
)
def test_what_takes_all_logits_neither_picks_from_a_vocabulary_nor_is_priced_so(params: dict[str, Any]) -> None:
    asked: list[bool] = []

    class Asking(FullDrafts):
        def streams(self, wishes: Rows[DraftWish], sequences: int) -> list[int]:
            asked.extend(wish.cut for wish in wishes)
            return super().streams(wishes, sequences)

    drafting, seq = Drafting(Asking(), cut=True), make_seq()
    drafting.streams([(seq, 3)], 1)
    drafting.learn(seq, [30] * 200)
    other = make_seq(2)
    other.params = replace(other.params, **params)
    assert [run.among is None for run in drafting.streams([(seq, 3), (other, 3)], 2)] == [False, True]
    assert asked == [False, True, False]


def test_a_sequence_is_read_once_whoever_began_it() -> None:
    drafting, seq = Drafting(cut=True), make_seq()
    seq.decode_steps = 4  # on a replica that went away
    drafting.streams([(seq, 3)], 1)
    seq.tokens.append(77)
    drafting.streams([(seq, 3)], 1)
    drafting.learn(seq, [30] * 200)
    (run,) = drafting.streams([(seq, 3)], 1)
    assert run.among is not None
    assert list(run.among) == [1, 2, 7, 8, 9, 30]


def test_draft_vocabularies_only_where_the_runner_picks_from_them_and_nobody_turned_them_off() -> None:
    off = (FastPath.DRAFT_VOCABULARY,)
    for drafting in (drafting_of(None, (), cuts=False), drafting_of(None, off, cuts=True)):
        seq = make_seq()
        drafting.streams([(seq, 3)], 1)
        drafting.learn(seq, [30] * 200)
        assert drafting.streams([(seq, 3)], 1) == [(3, None)]


def test_memory_of_adapters_is_bounded() -> None:
    drafting = Drafting(copies=False)

    def believed(adapter: str) -> float:
        seq = make_seq(adapter=adapter)
        seq.guesses = (Pick(5, 3.5),)
        drafting.choose([seq], 1)
        assert seq.chain is not None
        return seq.chain.survivals[0]

    def disappoint(adapter: str) -> None:
        seq = make_seq(adapter=adapter)
        seq.guesses = (Pick(5, 3.5),)
        drafting.choose([seq], 1)
        drafting.learn(seq, [4])

    fresh = believed("first")
    disappoint("first")
    assert believed("first") < fresh
    for i in range(ADAPTERS_KEPT):
        disappoint(str(i))
    assert believed("first") == fresh  # forgotten
    assert believed(str(ADAPTERS_KEPT - 1)) < fresh
