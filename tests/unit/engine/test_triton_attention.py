"""The GPU's attention kernel, interpreted, against attention by gathered segments: any sequences, blocks, heads and rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import interpreted  # noqa: F401  # before any kernel

from slipstream.engine.attention import AttentionRules, KVCache
from slipstream.engine.batch import build_batch
from slipstream.engine.plan import PlannedSequence
from slipstream.engine.triton_attention import TILE_QUERIES, PagedTables, paged_tables
from slipstream.protocol import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


def both(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, size: int, rules: AttentionRules,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(start, rows) of each sequence → (the kernel's result, the reference's), [n, heads, D]."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-(start + rows) // size) for start, rows in lengths]
    order = iter(torch.randperm(sum(needed), generator=generator).tolist())
    cache = KVCache([(kv_heads, dim)], sum(needed), size, dtype, CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    parts = [
        PlannedSequence(i, (1,) * rows, start, tuple(next(order) for _ in range(count)), False, 0, -1, GREEDY, 0)
        for i, ((start, rows), count) in enumerate(zip(lengths, needed, strict=True))
    ]
    query = torch.randn(heads, sum(rows for _, rows in lengths), dim, generator=generator).to(dtype)
    results = []
    for batch in (build_batch(parts, cache, CPU, paged_tables), build_batch(parts, cache, CPU)):
        results.append(batch.paged.layout.attend(query, cache.keys[0], cache.values[0], rules))
    return results[0], results[1]


LENGTHS = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=3)


@settings(max_examples=20, deadline=None)
@given(
    LENGTHS, st.sampled_from([(4, 4), (6, 2), (9, 3), (4, 1)]), st.sampled_from([8, 20, 64]), st.sampled_from([4, 16]),
    st.none() | st.integers(1, 90), st.none() | st.floats(1.0, 50.0), st.integers(0, 1000),
)  # fmt: skip
def test_the_kernel_is_the_reference(
    lengths: list[tuple[int, int]], heads: tuple[int, int], dim: int, size: int, window: int | None,
    softcap: float | None, seed: int,
) -> None:  # fmt: skip
    got, expected = both(lengths, *heads, dim, size, AttentionRules(0.3, window, softcap), seed=seed)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_float16_products_are_summed_in_float32() -> None:
    got, expected = both([(70, 1), (0, 33)], 6, 2, 64, 16, AttentionRules(64**-0.5, None, None), torch.float16)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("chunk", [7, 40])
def test_a_row_is_the_same_however_its_prompt_is_cut_and_whoever_is_beside_it(chunk: int) -> None:
    """To a few roundings here: the interpreter's own matrix product adds up by place, which a tensor core does not."""
    rules, (start, rows) = AttentionRules(0.2, None, None), (90, 40)
    generator = torch.Generator().manual_seed(1)
    cache = KVCache([(2, 16)], 40, 4, torch.float32, CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    query = torch.randn(4, rows, 16, generator=generator)
    blocks = tuple(range(40))

    def attend(first: int, count: int, company: bool) -> torch.Tensor:
        own = PlannedSequence(0, (1,) * count, start + first, blocks, False, 0, -1, GREEDY, 0)
        other = PlannedSequence(1, (1,) * 5, 30, blocks[::-1], False, 0, -1, GREEDY, 0)
        batch = build_batch([other, own] if company else [own], cache, CPU, paged_tables)
        mine = query[:, first : first + count]
        q = torch.cat([query[:, :5] * 3, mine], dim=1) if company else mine
        return batch.paged.layout.attend(q, cache.keys[0], cache.values[0], rules)[-count:]

    whole = attend(0, rows, company=False)
    pieces = [attend(i, min(chunk, rows - i), company=True) for i in range(0, rows, chunk)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=1e-6)


def test_tiles_cover_every_row_once_and_never_two_sequences() -> None:
    cache = KVCache([(1, 16)], 20, 4, torch.float32, CPU)
    parts = [
        PlannedSequence(i, (1,) * rows, start, tuple(range(20)), False, 0, -1, GREEDY, 0)
        for i, (start, rows) in enumerate([(5, 1), (0, 2 * TILE_QUERIES + 3), (7, TILE_QUERIES)])
    ]
    layout = build_batch(parts, cache, CPU, paged_tables).paged.layout
    assert isinstance(layout, PagedTables)
    rows = [row for _, first, count, _ in layout.tiles.tolist() for row in range(first, first + count)]
    assert rows == list(range(1 + 2 * TILE_QUERIES + 3 + TILE_QUERIES))
    assert [tile[0] for tile in layout.tiles.tolist()] == [0, 1, 1, 1, 2]
