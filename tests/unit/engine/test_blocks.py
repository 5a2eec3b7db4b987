"""The block pool: a reference model of it, driven by hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.blocks import BlockPool, chain_hash, root_hash


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
    hashes = [b"a", b"b"]
    first = pool.allocate(2)
    assert first is not None
    for block, h in zip(first, hashes, strict=True):
        pool.publish(block, h)
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
    pool.publish(block[0], b"x")
    assert pool.match([b"x"]) == block
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
            blocks = pool.match([bytes([i]) for i in range(n)])
            if blocks:
                tables.append(blocks)
        elif what == "publish" and tables:
            for i, block in enumerate(tables[n % len(tables)]):
                pool.publish(block, bytes([i]))
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    pool.check_integrity([])
    assert pool.num_free == 6
