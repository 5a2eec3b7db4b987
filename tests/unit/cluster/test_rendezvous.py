"""Rendezvous hashing: orders stay put, and keys spread evenly."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from slipstream.cluster.rendezvous import first, seed_of

NAMES = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=8, unique=True)


def members(names: list[str]) -> list[tuple[str, int]]:
    return [(name, seed_of(name)) for name in names]


@given(NAMES, st.text(max_size=5), st.integers(0, 7))
def test_who_leaves_changes_nobody_elses_order(names: list[str], key: str, index: int) -> None:
    order = first(key, members(names), len(names))
    gone = order[index % len(order)]
    rest = [name for name in names if name != gone]
    assert first(key, members(rest), len(rest)) == [name for name in order if name != gone]


@given(NAMES, st.text(max_size=5), st.integers(1, 8))
def test_the_first_few_begin_the_whole_order(names: list[str], key: str, count: int) -> None:
    assert first(key, members(names), count) == first(key, members(names[::-1]), len(names))[:count]


def test_keys_spread_evenly() -> None:
    names = [f"replica-{i}" for i in range(8)]
    counts = Counter(first(f"adapter-{i}", members(names), 1)[0] for i in range(8000))
    assert set(counts) == set(names)
    assert 850 < min(counts.values()) <= max(counts.values()) < 1150
