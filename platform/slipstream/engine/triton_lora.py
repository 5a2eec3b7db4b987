"""LoRA shrink and expand on GPUs, as Triton kernels: rows of any mix of adapters in two launches a projection.

The rows of a step are cut into tiles of up to `TILE_ROWS` consecutive rows of one adapter (`RowTiles`), and each program
works on one tile: an adapter's weights are read once for each tile, whatever the others are (the segmented gather of Punica,
arXiv 2310.18547, and S-LoRA, arXiv 2311.03285). A row's sums are added up in one order that does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import triton
import triton.language as tl

from slipstream.engine.linear import LinearGroup
from slipstream.engine.stacks import RankStack, bias_of, finish_dora_

TILE_ROWS = 16  # rows of the smallest tensor-core product
SPLITS = (
    4  # parts of the input dimension that are summed side by side, so that one row alone keeps more than one core busy
)
INPUTS = 64  # of them a step of the loop
COLUMNS = 128  # most columns of the shrunk rows that a program computes
OUTPUTS = 128  # columns of the output that a program writes


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Rows by adapter. tiles: int32 [T, 3] = first row, rows (0 = an empty tile), place in the stack; places: int64 [n], the
    place of each row, -1 = none."""

    tiles: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class TritonRows:
    """All rows of a call that have an adapter of one stack."""

    stack: RankStack
    rows: RowTiles

    @staticmethod
    def of(stack: RankStack, places: Sequence[int], device: torch.device) -> TritonRows:
        """places: each row's place in the stack, -1 = none."""
        tiles = torch.tensor(tiles_of(places), dtype=torch.int32, device=device)
        return TritonRows(stack, RowTiles(tiles, torch.tensor(places, dtype=torch.int64, device=device)))

    def apply_(self, group: LinearGroup, x: torch.Tensor, y: torch.Tensor) -> None:
        """y += x A B on these rows (then DoRA's gain)."""
        part = self.stack.parts.get(group.key)
        if part is None:
            return
        partial = shrink(x, part.shrink, self.rows.tiles)
        if (
            group.lora.group.size > 1
        ):  # ranks exchange rounded numbers, as those of one rank are before they are expanded
            partial = group.lora.meet(partial.sum(0, keepdim=True).to(x.dtype), len(group.names)).float()
        for m, out in enumerate(group.split(y)):
            expand, gains = part.expand[m], part.gains[m]
            if expand is None:
                continue
            expand_(out[:, group.expanded(m)], partial, m * expand.shape[1], expand, self.rows.tiles)
            if gains is not None:
                places = self.rows.places
                mine = torch.where(places.unsqueeze(1) < 0, 1.0, gains[places.clamp_min(0)])
                finish_dora_(out, mine, bias_of(group, m))


def tiles_of(places: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first row, rows, place) of each tile, for the place of each row (-1 = none)."""
    tiles = []
    row = 0
    for place, run in groupby(places):
        count = len(list(run))
        if place >= 0:
            tiles += [(row + i, min(TILE_ROWS, count - i), place) for i in range(0, count, TILE_ROWS)]
        row += count
    return tiles


def shrink(x: torch.Tensor, weights: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """x [n, in] times weights [P, in, R] → partial sums, float32 [SPLITS, n, R]; rows without a tile hold anything."""
    n, inputs = x.shape
    rank = weights.shape[2]
    partial = torch.empty(SPLITS, n, rank, dtype=torch.float32, device=x.device)
    columns = min(COLUMNS, max(16, triton.next_power_of_2(rank)))
    _shrink[(len(tiles), SPLITS, triton.cdiv(rank, columns))](
        x, weights, partial, tiles, n, inputs, rank, x.stride(0), weights.stride(0),
        ROWS=TILE_ROWS, COLUMNS=columns, INPUTS=INPUTS, SPLITS=SPLITS,
    )  # fmt: skip
    return partial


def expand_(y: torch.Tensor, partial: torch.Tensor, column: int, weights: torch.Tensor, tiles: torch.Tensor) -> None:
    """y [n, out] += partial's [S, n, …] columns column … column + R (summed over S) times weights [P, R, out], in place."""
    outputs, rank = y.shape[1], weights.shape[1]
    if outputs == 0:  # this rank has none of them
        return
    _expand[(len(tiles), triton.cdiv(outputs, OUTPUTS))](
        y, partial, weights, tiles, outputs, rank, column,
        y.stride(0), partial.stride(0), partial.stride(1), weights.stride(0),
        ROWS=TILE_ROWS, RANK=max(16, triton.next_power_of_2(rank)), OUTPUTS=OUTPUTS, SPLITS=partial.shape[0],
    )  # fmt: skip


@triton.jit
def _shrink(
    x, weights, partial, tiles, n, inputs, rank, x_stride, weights_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    first, count, place = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if count == 0:
        return
    rows = first + tl.arange(0, ROWS)
    mine = tl.arange(0, ROWS) < count
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    weights += place.to(tl.int64) * weights_stride
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(split * INPUTS, inputs, SPLITS * INPUTS):
        at = start + tl.arange(0, INPUTS)
        a = tl.load(x + rows[:, None] * x_stride + at[None, :], mask=mine[:, None] & (at < inputs)[None, :], other=0.0)
        b = tl.load(
            weights + at[:, None] * rank + columns[None, :],
            mask=(at < inputs)[:, None] & (columns < rank)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    out = partial + (split * n + rows[:, None]) * rank + columns[None, :]
    tl.store(out, total, mask=mine[:, None] & (columns < rank)[None, :])


@triton.jit
def _expand(
    y, partial, weights, tiles, outputs, rank, column, y_stride, split_stride, row_stride, weights_stride,
    ROWS: tl.constexpr, RANK: tl.constexpr, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    first, count, place = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if count == 0:
        return
    rows = first + tl.arange(0, ROWS)
    mine = tl.arange(0, ROWS) < count
    ranks = tl.arange(0, RANK)
    out = block * OUTPUTS + tl.arange(0, OUTPUTS)
    shrunk = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        shrunk += tl.load(
            partial + split * split_stride + rows[:, None] * row_stride + column + ranks[None, :],
            mask=mine[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
    weights += place.to(tl.int64) * weights_stride
    b = tl.load(
        weights + ranks[:, None] * outputs + out[None, :],
        mask=(ranks < rank)[:, None] & (out < outputs)[None, :],
        other=0.0,
    )
    delta = tl.dot(shrunk.to(b.dtype), b, input_precision="ieee")
    at = y + rows[:, None] * y_stride + out[None, :]
    inside = mine[:, None] & (out < outputs)[None, :]
    # Rounded before it is added, as torch's own product would be.
    tl.store(at, tl.load(at, mask=inside, other=0.0) + delta.to(b.dtype), mask=inside)
