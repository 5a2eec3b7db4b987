"""Attention over the paged KV cache on GPUs, as a Triton kernel: decode, verification and prefill in one launch a layer.

Each program takes a tile of up to `TILE_QUERIES` consecutive rows of one sequence and one KV head with all its query heads,
walks the sequence's blocks through its block table, and keeps a running softmax (FlashAttention, arXiv 2205.14135; paged as
in PagedAttention, arXiv 2309.06180). Keys are taken in tiles that begin at fixed positions, so a row's sums are added up in
one order whatever its company and however its prompt was chunked. (torch's own paged attention wants FlashAttention 3
installed beside it, FlashAttention 2 pages of 256 tokens: docs/decisions/0011.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from slipstream.engine.attention import AttentionRules
from slipstream.engine.plan import PlannedSequence

TILE_QUERIES = 16  # rows of a sequence that a program takes, with all query heads of a KV head
TILE_KEYS = 64  # keys a step of its loop


@dataclass(frozen=True, slots=True)
class PagedTables:
    """Tiles of query rows and the sequences' blocks, int32 on the device.

    tiles: [T, 4] = sequence, first row, rows (0 = an empty tile), position of the first row. blocks: [B, W] block table.
    """

    tiles: torch.Tensor
    blocks: torch.Tensor

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        """See `AttentionLayout`. Rows in no tile get anything."""
        heads, n, dim = query.shape
        kv_heads, _, block_size, value_dim = values.shape
        out = query.new_empty(n, heads, value_dim)
        _attend[(self.tiles.shape[0], kv_heads)](
            query, keys, values, out, self.tiles, self.blocks,
            rules.scaling, rules.window or 0, rules.softcap or 0.0, dim, value_dim, heads // kv_heads,
            query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            out.stride(0), out.stride(1), self.blocks.stride(0),
            BLOCK_SIZE=block_size, GROUP=triton.next_power_of_2(heads // kv_heads), QUERIES=TILE_QUERIES, KEYS=TILE_KEYS,
            DIM=max(16, triton.next_power_of_2(dim)), VALUE_DIM=max(16, triton.next_power_of_2(value_dim)),
            WINDOW=rules.window is not None, SOFTCAP=rules.softcap is not None,
        )  # fmt: skip
        return out


def paged_tables(
    parts: Sequence[PlannedSequence], first_row: Sequence[int], block_size: int, device: torch.device
) -> PagedTables:
    """Tables of a step's sequences; the first row of each is given."""
    tiles: list[tuple[int, int, int, int]] = []
    blocks: list[list[int]] = []
    for sequence, (part, first) in enumerate(zip(parts, first_row, strict=True)):
        count = len(part.tokens)
        tiles += [
            (sequence, first + i, min(TILE_QUERIES, count - i), part.start + i) for i in range(0, count, TILE_QUERIES)
        ]
        blocks.append(list(part.blocks[: -(-(part.start + count) // block_size)]))
    width = max(map(len, blocks))
    table = [own + [0] * (width - len(own)) for own in blocks]
    return PagedTables(
        torch.tensor(tiles, dtype=torch.int32, device=device), torch.tensor(table, dtype=torch.int32, device=device)
    )


@triton.jit
def _attend(
    query, keys, values, out, tiles, blocks,
    scaling, window, softcap, dim, value_dim, group,
    query_head, query_row, key_head, key_block, value_head, value_block, out_row, out_head, table_row,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, first = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    count, start = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    if count == 0:
        return
    member = tl.arange(0, QUERIES * GROUP)  # (row, query head of the group)
    row, head = member // GROUP, kv_head * group + member % GROUP
    mine = (row < count) & (member % GROUP < group)
    at = start + row  # position of each query
    d, dv = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    q = tl.load(
        query + head[:, None] * query_head + (first + row).to(tl.int64)[:, None] * query_row + d[None, :],
        mask=mine[:, None] & (d < dim)[None, :],
        other=0.0,
    )
    best = tl.full((QUERIES * GROUP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES * GROUP,), dtype=tl.float32)
    acc = tl.zeros((QUERIES * GROUP, VALUE_DIM), dtype=tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(start - window + 1, 0) // KEYS * KEYS
    for begin in range(low, start + count, KEYS):
        key = begin + tl.arange(0, KEYS)
        there = key < start + count
        block = tl.load(blocks + sequence * table_row + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        inside = key % BLOCK_SIZE
        k = tl.load(
            keys + kv_head * key_head + block[None, :] * key_block + inside[None, :] * dim + d[:, None],
            mask=there[None, :] & (d < dim)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
        seen = key[None, :] <= at[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: a window that begins later
        weights = tl.exp(scores - safe[:, None])
        kept = tl.exp(best - safe)
        total = total * kept + tl.sum(weights, axis=1)
        v = tl.load(
            values + kv_head * value_head + block[:, None] * value_block + inside[:, None] * value_dim + dv[None, :],
            mask=there[:, None] & (dv < value_dim)[None, :],
            other=0.0,
        )
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        best = higher
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # members that are nobody's row have seen no key
    tl.store(
        out + (first + row).to(tl.int64)[:, None] * out_row + head[:, None] * out_head + dv[None, :],
        result.to(out.dtype.element_ty),
        mask=mine[:, None] & (dv < value_dim)[None, :],
    )
