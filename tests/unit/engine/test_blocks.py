"""The block pool: a reference model of it, driven by hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.blocks import BlockPool, Link, chain_hash, root_hash

ROOT = root_hash("t", None)
LINKS = [Link.of(ROOT, [i // 4, i // 2, i, i]) for i in range(8)]


def test_allocate_is_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert pool.allocate(1) is None
    pool.release(blocks)
    assert pool.num_free == 4


def test_published_blocks_are_found_until_they_are_handed_out_again() -> None:
    pool = BlockPool(3, 4)
    head = Link.of(ROOT, [1, 2, 3, 4])
    tail = Link.of(head.hash, [5, 6, 7, 8])
    hashes = [head.hash, tail.hash]
    first = pool.allocate(2)
    assert first is not None
    for block, link in zip(first, (head, tail), strict=True):
        pool.publish(block, link)
    pool.release(first)
    assert pool.match(hashes) == first
    pool.release(first)
    assert pool.allocate(1) not in ([first[0]], [first[1]])  # the uncached block goes first
    again = pool.allocate(1)
    assert again == [first[1]]  # then the tail of the chain, never its head
    assert pool.match(hashes) == [first[0]]


def test_shared_blocks_stay_until_the_last_holder_goes() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate(1)
    assert block is not None
    link = Link.of(ROOT, [1, 2, 3, 4])
    pool.publish(block[0], link)
    assert pool.match([link.hash]) == block
    pool.release(block)
    assert pool.num_free == 1
    pool.release(block)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="twice"):
        pool.release(block)


def test_hashes_depend_on_everything_before_them() -> None:
    assert root_hash("a", None) != root_hash("b", None) != root_hash("b", "sha256:1")
    assert root_hash("ab", "c") != root_hash("a", "bc")
    one = chain_hash(root_hash("a", None), [1, 2])
    assert one != chain_hash(root_hash("a", None), [2, 1])
    assert chain_hash(one, [3]) != chain_hash(root_hash("a", None), [3])


def test_the_block_that_begins_most_alike_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2, 4)
    assert pool.similar(ROOT, [1, 2]) == (-1, 0)
    for tokens in ([1, 2, 3, 4], [1, 2, 5, 6]):
        block = pool.allocate(1)
        assert block is not None
        pool.publish(block[0], Link.of(ROOT, tokens))
        pool.release(block)
    assert pool.similar(ROOT, [1, 2, 5, 9]) == (1, 3)
    assert pool.similar(ROOT, [7]) == (-1, 0)
    assert pool.similar(root_hash("u", None), [1, 2]) == (-1, 0)
    assert pool.similar(ROOT, [1, 2, 3]) == (0, 3)  # … and its block is now the one used last
    assert pool.allocate(1) == [1]
    assert pool.similar(ROOT, [1, 2, 5, 9]) == (0, 2)
    assert pool.allocate(1) == [0]
    assert pool.similar(ROOT, [1, 2]) == (-1, 0)


BLOCKS_OF_4 = st.lists(st.integers(0, 2), min_size=4, max_size=4)


@given(st.lists(BLOCKS_OF_4, max_size=12), st.lists(st.integers(0, 2), max_size=4), st.integers(0, 12))
def test_no_published_block_begins_more_alike(held: list[list[int]], wanted: list[int], evicted: int) -> None:
    pool = BlockPool(12, 4)
    for tokens in held:
        block = pool.allocate(1)
        assert block is not None
        pool.publish(block[0], Link.of(ROOT, tokens))
        pool.release(block)
    gone = pool.allocate(evicted)
    assert gone is not None
    pool.check_integrity([gone])

    def shared(tokens: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), len(wanted))

    left = [tokens for tokens in held if pool.match([Link.of(ROOT, tokens).hash])]
    found, most = pool.similar(ROOT, wanted)
    assert most == max(map(shared, left), default=0)
    assert (found >= 0) == (most > 0)


@given(st.lists(st.tuples(st.sampled_from(["take", "drop", "match", "publish"]), st.integers(0, 7)), max_size=60))
def test_any_sequence_of_calls_keeps_the_pool_whole(calls: list[tuple[str, int]]) -> None:
    pool = BlockPool(6, 4)
    tables: list[list[int]] = []
    for what, n in calls:
        if what == "take":
            blocks = pool.allocate(n % 4)
            if blocks:
                tables.append(blocks)
        elif what == "drop" and tables:
            pool.release(tables.pop(n % len(tables)))
        elif what == "match":
            blocks = pool.match([link.hash for link in LINKS[:n]])
            if blocks:
                tables.append(blocks)
        elif what == "publish" and tables:
            for i, block in enumerate(tables[n % len(tables)]):
                pool.publish(block, LINKS[i])
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    pool.check_integrity([])
    assert pool.num_free == 6
