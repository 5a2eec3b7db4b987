"""Draft vocabularies: what an adapter's requests hold, and when it is enough to pick from."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.vocabulary import MOST_IDS, READ_AT_MOST, DraftVocabulary


def test_holds_what_was_read_and_said() -> None:
    vocabulary = DraftVocabulary()
    vocabulary.read([9, 4, 9])
    vocabulary.learn([2, 4])
    assert vocabulary.ids == array("i", [2, 4, 9])


def test_what_was_shown_stays_as_it_was() -> None:
    vocabulary = DraftVocabulary()
    vocabulary.read([5])
    shown = vocabulary.ids
    assert vocabulary.ids is shown
    vocabulary.learn([6])
    assert (list(shown), list(vocabulary.ids)) == ([5], [5, 6])


def test_serves_once_the_model_says_little_that_is_new() -> None:
    vocabulary = DraftVocabulary()
    vocabulary.learn(range(200))
    assert not vocabulary.serves
    vocabulary.learn([7] * 80)
    assert not vocabulary.serves
    vocabulary.learn([7] * 40)
    assert vocabulary.serves


def test_serves_no_longer_when_the_adapter_says_other_things() -> None:
    vocabulary = DraftVocabulary()
    vocabulary.learn([7] * 200)
    vocabulary.learn(range(100, 112))
    assert not vocabulary.serves


def test_prompts_tokens_count_as_known() -> None:
    told, untold = DraftVocabulary(), DraftVocabulary()
    for start in range(0, 2000, 10):
        told.read(range(start, start + 10))
        for vocabulary in (told, untold):
            vocabulary.learn(range(start, start + 10))
    assert (told.serves, untold.serves) == (True, False)


def test_forgets_what_was_not_met_for_long() -> None:
    vocabulary = DraftVocabulary()
    vocabulary.read([1_000_000])
    for start in range(0, 2 * MOST_IDS, 64):
        vocabulary.learn([3])
        vocabulary.read(range(start, start + 64))
    assert 1_000_000 not in vocabulary.ids
    assert 3 in vocabulary.ids
    assert 2 * MOST_IDS - 1 in vocabulary.ids


def test_reads_the_end_of_a_long_prompt() -> None:
    vocabulary = DraftVocabulary()
    vocabulary.read([1] * 10 + [2] * READ_AT_MOST)
    assert list(vocabulary.ids) == [2]


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 3000), max_size=400)), max_size=30))
def test_ids_are_ascending_few_and_the_latest_are_among_them(turns: list[tuple[bool, list[int]]]) -> None:
    vocabulary = DraftVocabulary()
    met: list[int] = []
    for is_prompt, tokens in turns:
        (vocabulary.read if is_prompt else vocabulary.learn)(tokens)
        met += tokens
        ids = list(vocabulary.ids)
        assert ids == sorted(set(ids))
        assert len(ids) < MOST_IDS
        assert set(ids) <= set(met)
        latest = list(dict.fromkeys(reversed(met)))[: MOST_IDS // 2 - 400]
        assert set(latest) <= set(ids)
