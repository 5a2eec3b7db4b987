"""Small steps on GPUs as CUDA graphs: the decoder's two thousand launches become one.

A graph is captured for a number of rows (`ROW_BUCKETS`) and the adapter stacks in use, on buffers that stay where they are; a
step fills the buffers and replays. Steps are padded with rows that stand for nobody: they read and write a spare KV block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from slipstream.engine.attention import KVCache, PagedBatch
from slipstream.engine.batch import StepBatch
from slipstream.engine.costs import GREEDY
from slipstream.engine.linear import RowContext
from slipstream.engine.plan import PlannedSequence
from slipstream.engine.triton_attention import PagedTables
from slipstream.engine.triton_lora import RowTiles, TritonRows

ROW_BUCKETS = (1, 2, 4, 8, *range(16, 129, 8), *range(144, 257, 16))
GRAPHS_KEPT = 128  # captures; the one unused for longest gives way

Decode = Callable[[torch.Tensor, torch.Tensor, PagedBatch], torch.Tensor]
"""(input ids [n], positions [n], attention) → final hidden states [n, H]."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A recorded computation: `replay` runs it again on the same buffers and leaves the result in `out`."""

    replay: Callable[[], None]
    out: torch.Tensor


class Capture(Protocol):
    """How a computation is recorded. The public fake, `record_again`, computes it anew."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        """Record `work`, which must only depend on the contents of its buffers."""
        ...


class CudaCapture:
    """CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        """Record `work`, after running it once: kernels are compiled and libraries set up outside the recording."""
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # adapters load meanwhile
            out = work()
        return Captured(graph.replay, out)


def record_again(work: Callable[[], torch.Tensor]) -> Captured:
    """A `Capture` for any device, which saves nothing."""
    out = work().clone()

    def replay() -> None:
        out.copy_(work())

    return Captured(replay, out)


def bucket_of(rows: int) -> int | None:
    """Rows of the smallest graph that takes so many; None = too many for one."""
    at = bisect_left(ROW_BUCKETS, rows)
    return ROW_BUCKETS[at] if at < len(ROW_BUCKETS) else None


class GraphedDecoder:
    """The decoder behind graphs. Owned by the runner, which pads steps by `padding` first."""

    def __init__(self, decode: Decode, rows: RowContext, cache: KVCache, max_blocks: int, capture: Capture) -> None:
        """`max_blocks`: most blocks of a sequence. The cache needs a spare block."""
        self._decode = decode
        self._rows = rows
        self._cache = cache
        self._capture = capture
        most, device = ROW_BUCKETS[-1], cache.keys[0].device
        self._ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._kv_slots = torch.zeros_like(self._ids)
        self._tiles = torch.zeros(most, 4, dtype=torch.int32, device=device)
        self._blocks = torch.zeros(most, max_blocks, dtype=torch.int32, device=device)
        self._lora: dict[int, RowTiles] = {}  # by rank
        self._graphs: dict[tuple[int, ...], Captured] = {}  # rows and stack versions; the latest used last

    def padding(self, rows: int) -> list[PlannedSequence]:
        """Sequences of one row that fill a step of `rows` rows up to the next bucket; none when it is too long for one."""
        bucket = bucket_of(rows)
        spare = (self._cache.num_blocks,)
        blank = PlannedSequence(-1, (0,), 0, spare, False, 0, -1, GREEDY, 0)
        return [blank] * (bucket - rows) if bucket is not None else []

    def __call__(self, batch: StepBatch) -> torch.Tensor | None:
        """Hidden states [n, H] of a step, valid until the next one; None when it must run without a graph."""
        rows = len(batch.input_ids)
        layout = batch.paged.layout
        adapters = [a for a in self._rows.adapters if isinstance(a, TritonRows)]
        assert len(adapters) == len(self._rows.adapters)
        assert isinstance(layout, PagedTables)
        if bucket_of(rows) != rows:
            return None
        self._fill(batch, layout, adapters)
        key = (rows, *(a.stack.version for a in adapters))
        captured = self._graphs.pop(key, None)
        if captured is None:
            captured = self._record(rows, adapters)
            if len(self._graphs) >= GRAPHS_KEPT:
                del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = captured
        captured.replay()
        return captured.out

    def _fill(self, batch: StepBatch, layout: PagedTables, adapters: Sequence[TritonRows]) -> None:
        """The step's numbers into the buffers that graphs read."""
        rows = len(batch.input_ids)
        self._ids[:rows].copy_(batch.input_ids)
        self._positions[:rows].copy_(batch.positions)
        self._kv_slots[:rows].copy_(batch.paged.slots)
        _fill_tiles(self._tiles[:rows], layout.tiles)
        sequences, width = layout.blocks.shape
        self._blocks[:sequences, :width].copy_(layout.blocks)
        for adapter in adapters:
            buffers = self._lora_buffers(adapter)
            _fill_tiles(buffers.tiles, adapter.rows.tiles)
            buffers.places.copy_(adapter.rows.places)

    def _lora_buffers(self, adapter: TritonRows) -> RowTiles:
        """The buffers of a stack of this rank, cut to the rows of the step."""
        rank, rows = adapter.stack.rank, len(adapter.rows.places)
        if rank not in self._lora:
            most, device = ROW_BUCKETS[-1], self._ids.device
            tiles = torch.zeros(most, 3, dtype=torch.int32, device=device)
            self._lora[rank] = RowTiles(tiles, torch.zeros(most, dtype=torch.int64, device=device))
        whole = self._lora[rank]
        return RowTiles(whole.tiles[:rows], whole.places[:rows])

    def _record(self, rows: int, adapters: Sequence[TritonRows]) -> Captured:
        tables = PagedTables(self._tiles[:rows], self._blocks)
        paged = PagedBatch(self._cache, self._kv_slots[:rows], tables)
        on_buffers = tuple(TritonRows(a.stack, self._lora_buffers(a)) for a in adapters)

        def work() -> torch.Tensor:
            self._rows.adapters = on_buffers
            return self._decode(self._ids[:rows], self._positions[:rows], paged)

        return self._capture(work)


def _fill_tiles(buffer: torch.Tensor, tiles: torch.Tensor) -> None:
    """Tiles, and empty ones behind them: a graph always launches as many as it has rows."""
    buffer[: len(tiles)].copy_(tiles)
    buffer[len(tiles) :].zero_()
