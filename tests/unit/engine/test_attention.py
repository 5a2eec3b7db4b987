"""Attention by gathered segments: where blocks lie side by side nothing is copied, and nothing changes."""

from __future__ import annotations

import pytest
import torch

from slipstream.engine.attention import AttentionRules, KVCache, Segments
from slipstream.engine.batch import build_batch
from slipstream.engine.blocks import BlockPool
from slipstream.engine.plan import BlockCopy, PlannedSequence
from slipstream.protocol import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
SIZE, KV_HEADS, HEADS, DIM = 4, 2, 6, 16


def attend(order: list[int], start: int, rows: int, window: int | None) -> tuple[torch.Tensor, Segments]:
    """One sequence whose i-th block is order[i]; keys and values are the same whatever the order."""
    generator = torch.Generator().manual_seed(0)
    content = [torch.randn(KV_HEADS, len(order), SIZE, DIM, generator=generator) for _ in range(2)]
    query = torch.randn(HEADS, rows, DIM, generator=generator)
    cache = KVCache([(KV_HEADS, DIM)], max(order) + 1, SIZE, torch.float32, CPU)
    for tensor, own in zip((cache.keys[0], cache.values[0]), content, strict=True):
        tensor[:, order] = own
    part = PlannedSequence(0, (1,) * rows, start, tuple(order), False, 0, -1, GREEDY, 0)
    layout = build_batch([part], cache, CPU).paged.layout
    assert isinstance(layout, Segments)
    return layout.attend(query, cache.keys[0], cache.values[0], AttentionRules(0.3, window, None)), layout


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("start", "rows"), [(0, 20), (13, 1), (5, 30), (39, 1)])
def test_blocks_side_by_side_are_attended_where_they_lie(start: int, rows: int, window: int | None) -> None:
    scattered, by_copy = attend([7, 2, 9, 4, 1, 8, 3, 12, 5, 11], start, rows, window)
    straight, in_place = attend(list(range(3, 13)), start, rows, window)
    assert isinstance(in_place.segments[0].tables, int)
    assert isinstance(by_copy.segments[0].tables, torch.Tensor)
    assert torch.equal(scattered, straight)


def test_a_query_sees_what_is_before_it_and_nothing_else() -> None:
    """Against a softmax written out, so that the mask that starts at the first query is right."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(KV_HEADS, 10, SIZE, DIM, generator=generator).flatten(1, 2) for _ in range(2))
    query = torch.randn(HEADS, 9, DIM, generator=generator)
    got, _ = attend(list(range(10)), 17, 9, None)
    for row in range(9):
        for head in range(HEADS):
            k, v = keys[head // 3, : 18 + row], values[head // 3, : 18 + row]
            expected = (0.3 * k @ query[head, row]).softmax(0) @ v
            torch.testing.assert_close(got[row, head], expected, rtol=1e-5, atol=1e-5)


def test_copies_of_one_step_read_what_was_there_before_it() -> None:
    """A block that one sequence begins with may go to another one in the same step."""
    cache = KVCache([(KV_HEADS, DIM)] * 2, 5, SIZE, torch.bfloat16, CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    cache.copy([BlockCopy(0, 3), BlockCopy(4, 0), BlockCopy(0, 2)])
    for tensor, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(tensor, old[:, [4, 1, 0, 0, 4]])


def test_rows_of_one_pool_come_out_ascending() -> None:
    """So that a prompt's blocks lie side by side again after others came and went."""
    pool = BlockPool(8, SIZE)
    first, second = pool.allocate(3), pool.allocate(4)
    assert first is not None
    assert second is not None
    pool.release(first)
    pool.release(second)
    again = pool.allocate(7)
    assert again == sorted(again or ())
