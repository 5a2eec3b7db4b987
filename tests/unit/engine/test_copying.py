"""What followed before: against a search that looks everywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.copying import LONGEST_MATCH, NOTHING, PLACES, READ_AT_ONCE, Copied, CopyIndex


def search(tokens: list[int], most: int) -> Copied:
    """The definition, read off."""
    last = len(tokens) - 1
    places = [i for i in range(last) if tokens[i] == tokens[last]][-PLACES:]
    if not places:
        return NOTHING

    def match(place: int) -> int:
        length = 0
        while length < LONGEST_MATCH and length <= place and tokens[place - length] == tokens[last - length]:
            length += 1
        return length

    place = max(places, key=lambda place: (match(place), place))
    return Copied(match(place), tokens[place + 1 : place + 1 + most])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.lists(st.integers(0, 3)), max_size=8))
def test_it_finds_what_followed_the_longest_match(prompt: list[int], steps: list[list[int]]) -> None:
    """While a sequence grows by none, one or several tokens at a time."""
    index, tokens = CopyIndex(), list(prompt)
    for step in [[], *steps]:
        tokens += step
        for most in (1, 8):
            assert index.find(tokens, most) == search(tokens, most)


def test_a_name_is_copied_from_the_prompt() -> None:
    assert CopyIndex().find([5, 6, 7, 8, 9, 1, 6, 7], 2) == (2, [8, 9])


def test_what_never_stood_there_is_not_found() -> None:
    assert CopyIndex().find([1, 2, 3], 8) is NOTHING


def test_a_long_prompt_is_read_over_several_steps() -> None:
    tokens = [*range(10, 10 + 2 * READ_AT_ONCE), 10 + READ_AT_ONCE + 5]
    index = CopyIndex()
    assert index.find(tokens, 1) is NOTHING
    assert index.find(tokens, 1) == (1, [10 + READ_AT_ONCE + 6])


def test_where_nothing_may_be_drafted_nothing_is_found() -> None:
    assert CopyIndex().find([4, 4, 4], 0) is NOTHING


def test_nothing_follows_the_end_but_what_there_is() -> None:
    assert CopyIndex().find([4, 4], 8) == (1, [4])
