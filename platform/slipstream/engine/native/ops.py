"""The C++ kernels behind the engine's seams: layer operations, attention and adapters on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby

import torch
from torch import nn

from slipstream.engine.attention import AttentionRules, KVCache
from slipstream.engine.flat import Layer, Norm, TorchOps, Whole
from slipstream.engine.head import Candidates, torch_scores
from slipstream.engine.linear import LinearGroup
from slipstream.engine.native.build import library
from slipstream.engine.native.weights import Panels
from slipstream.engine.noise import noise_key
from slipstream.engine.plan import PlannedSequence
from slipstream.engine.sampling import Best, Drawn, RowRequest
from slipstream.engine.stacks import RankStack, bias_of, finish_dora_
from slipstream.engine.streams import PreparedStreams, torch_stream_states

LANES = 16  # of a vector: widths are whole multiples
LORA_ROWS = 4  # kLoraRows
QUERY_ROWS = 12  # kRows
MAX_DIM = 256  # kMaxDim
SILU = frozenset({"SiLU", "SiLUActivation"})  # torch's and transformers'
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these kernels can run here; builds them if need be."""
    return device.type == "cpu" and dtype in DTYPES and library() is not None


def attends(shapes: Sequence[tuple[int, int]], block_size: int) -> bool:
    """Whether `paged` serves such a cache. shapes: (kv_heads, head_dim) of each layer."""
    return block_size % LANES == 0 and all(dim % LANES == 0 and dim <= MAX_DIM for _, dim in shapes)


@cache
def _kernel(name: str, dtype: torch.dtype, in_pairs: bool = False) -> Callable[..., None]:
    found: Callable[..., None] = getattr(library(), f"slipstream_{name}_{'pairs' if in_pairs else DTYPES[dtype]}")
    return found


class NativeOps(TorchOps):
    """Layer operations by one call each; shapes that the kernels do not serve go the way of torch."""

    def add_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """See `TorchOps`."""
        rows, width = hidden.shape
        if width % LANES:
            return super().add_norm(hidden, delta, norm)
        out = torch.empty_like(hidden)
        _kernel("add_norm", hidden.dtype)(
            out.data_ptr(), hidden.data_ptr(), delta.data_ptr() if delta is not None else None, norm.weight.data_ptr(),
            norm.eps, rows, width,
        )  # fmt: skip
        return out

    def gate(self, gate_up: torch.Tensor, act: nn.Module) -> torch.Tensor:
        """See `TorchOps`."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if width % LANES or type(act).__name__ not in SILU:
            return super().gate(gate_up, act)
        out = gate_up.new_empty(rows, width)
        _kernel("silu_mul", out.dtype)(out.data_ptr(), gate_up.data_ptr(), rows, width)
        return out

    def rotate_store(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: tuple[Norm, Norm] | None,
        cache: KVCache,
        layer: int,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """See `TorchOps`."""
        rows, width, dim = qkv.shape
        if dim % LANES:
            return super().rotate_store(qkv, rotary, norms, cache, layer, slots)
        keys, values = cache.keys[layer], cache.values[layer]
        kv_heads = keys.shape[0]
        heads = width - 2 * kv_heads
        q, k = (norm.weight.data_ptr() for norm in norms) if norms else (None, None)
        cos, sin = rotary
        _kernel("rotate_store", qkv.dtype)(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), q, k, norms[0].eps if norms else 0.0, keys.data_ptr(),
            values.data_ptr(), slots.data_ptr(), rows, heads, kv_heads, dim, keys.shape[1] * keys.shape[2],
        )  # fmt: skip
        return qkv[:, :heads].transpose(0, 1)

    def whole(self, layers: Sequence[Layer], norm: Norm) -> Whole | None:
        """See `TorchOps`."""
        from slipstream.engine.native.decoder import NativeDecoder  # noqa: PLC0415  # which is made of these kernels

        return NativeDecoder.of(layers, norm)


@dataclass(frozen=True, slots=True)
class Paged:
    """Attention straight from the cache's blocks. sequences: int64 [S, 4] = first row, rows, position of the first, where its
    blocks begin in `tables`, int32. tasks: by heads in a KV group, int64 [T, 3] = sequence, first member, members."""

    counts: tuple[int, ...]  # rows of each sequence
    sequences: torch.Tensor
    tables: torch.Tensor
    longest: int
    tasks: dict[int, torch.Tensor] = field(default_factory=dict)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        """See `AttentionLayout`."""
        heads, rows, dim = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        kv_heads, blocks, size, _ = keys.shape
        group = heads // kv_heads
        tasks = self.tasks_of(group)
        out = query.new_empty(rows, heads, dim)
        _kernel("attend", query.dtype)(
            out.data_ptr(), query.data_ptr(), keys.data_ptr(), values.data_ptr(), self.sequences.data_ptr(),
            tasks.data_ptr(), self.tables.data_ptr(), tasks.shape[0], kv_heads, self.longest, group, dim,
            query.stride(1), query.stride(0), heads * dim, blocks, size, rules.window or 0, rules.scaling,
            rules.softcap or 0.0,
        )  # fmt: skip
        return out

    def tasks_of(self, group: int) -> torch.Tensor:
        """The tasks of heads that share KV heads in groups of so many."""
        found = self.tasks.get(group)
        if found is None:
            found = torch.tensor(
                [
                    (i, first, min(QUERY_ROWS, count * group - first))
                    for i, count in enumerate(self.counts)
                    for first in range(0, count * group, QUERY_ROWS)
                ]
            )
            self.tasks[group] = found
        return found


def paged(parts: Sequence[PlannedSequence], first_row: Sequence[int], block_size: int, device: torch.device) -> Paged:
    """Lay sequences out for `Paged`: a `LayOut`."""
    sequences: list[tuple[int, int, int, int]] = []
    tables: list[int] = []
    longest = 0
    for part, first in zip(parts, first_row, strict=True):
        end = part.start + len(part.tokens)
        sequences.append((first, len(part.tokens), part.start, len(tables)))
        tables += part.blocks[: -(-end // block_size)]
        longest = max(longest, end)
    return Paged(
        tuple(len(part.tokens) for part in parts),
        torch.tensor(sequences),
        torch.tensor(tables, dtype=torch.int32),
        longest,
    )


@dataclass(frozen=True, slots=True)
class NativeRows:
    """All rows of a call that have an adapter of one stack. tiles: int64 [T, 3] = first row, rows, place in the stack;
    places: int64 [n], the place of each row, -1 = none. members: by group, int64 [k, 3] = first column, width, expand's
    address (0 = none has this member); valid as long as the stack's tensors stay, as layouts are."""

    stack: RankStack
    tiles: torch.Tensor
    places: torch.Tensor
    members: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def in_pairs(self) -> bool:
        """Whether the stack's weights lie as processors with AVX512-BF16 want them."""
        return isinstance(self.stack.layout, Panels) and self.stack.layout.inputs > 1

    @staticmethod
    def of(stack: RankStack, places: Sequence[int]) -> NativeRows:
        """places: each row's place in the stack, -1 = none."""
        tiles = []
        row = 0
        for place, run in groupby(places):
            count = len(list(run))
            if place >= 0:
                tiles += [(row + i, min(LORA_ROWS, count - i), place) for i in range(0, count, LORA_ROWS)]
            row += count
        return NativeRows(stack, torch.tensor(tiles), torch.tensor(places))

    def apply_(self, group: LinearGroup, x: torch.Tensor, y: torch.Tensor) -> None:
        """y += x A B on these rows (then DoRA's gain)."""
        part = self.stack.parts.get(group.key)
        if part is None:
            return
        members = self.members.get(group.key)
        if members is None:
            members = self.members[group.key] = member_table(group, part.expand)
        if x.stride(1) != 1:
            x = x.contiguous()
        columns, num_tiles = part.shrink.shape[2], self.tiles.shape[0]
        scratch = torch.empty(num_tiles, 4, LORA_ROWS, columns)
        _kernel("lora", x.dtype, self.in_pairs)(
            y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[1], part.shrink.data_ptr(), columns,
            self.stack.rank, members.data_ptr(), members.shape[0], self.tiles.data_ptr(), num_tiles, scratch.data_ptr(),
        )  # fmt: skip
        if not any(gains is not None for gains in part.gains):
            return
        for m, (out, gains) in enumerate(zip(group.split(y), part.gains, strict=True)):
            if gains is not None:
                mine = torch.where(self.places.unsqueeze(1) < 0, 1.0, gains[self.places.clamp_min(0)])
                finish_dora_(out, mine, bias_of(group, m))


def best(logits: torch.Tensor) -> Best:
    """See `torch_best`."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    ids, values, gaps = torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)
    _kernel("best", logits.dtype)(
        ids.data_ptr(), values.data_ptr(), gaps.data_ptr(), logits.data_ptr(), logits.stride(0), rows, width
    )
    return Best(ids, values, gaps)


class _Candidates(ctypes.Structure):
    _fields_ = (("ids", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("count", "row", "rows")))


def scores(weight: torch.Tensor, states: torch.Tensor, candidates: Sequence[Candidates]) -> torch.Tensor:
    """See `Scores`."""
    rows, width = states.shape
    if width % LANES or not weight.is_contiguous():
        return torch_scores(weight, states, candidates)
    states = states.contiguous()
    most = max(len(each.ids) for each in candidates)
    out = torch.empty(rows, most)
    table = (_Candidates * len(candidates))(
        *(_Candidates(ids.buffer_info()[0], len(ids), own.start, len(own)) for ids, own in candidates)
    )
    _kernel("scores", states.dtype)(
        out.data_ptr(), most, weight.data_ptr(), width, states.data_ptr(), ctypes.addressof(table), len(candidates)
    )
    return out


class _Draw(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_uint64), ("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("min_p", ctypes.c_float),
        ("top_k", ctypes.c_int32),
    )  # fmt: skip


def draw(logits: torch.Tensor, rows: Sequence[RowRequest], most: int) -> Drawn:
    """See `Draw`."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    count, width = logits.shape
    draws = (_Draw * count)(
        *(
            _Draw(
                noise_key(row.params.seed, row.position),
                row.temperature,
                p.top_p,
                p.min_p,
                max(p.top_k, 0),
            )
            for row in rows
            for p in (row.params,)
        )
    )
    ids, noise, sums = torch.empty(count, most, dtype=torch.int64), torch.empty(count, most), torch.empty(count, most)
    _kernel("draw", logits.dtype)(
        ids.data_ptr(), noise.data_ptr(), sums.data_ptr(), logits.data_ptr(), logits.stride(0), count, width,
        ctypes.addressof(draws), most,
    )  # fmt: skip
    return Drawn(ids, noise, sums)


class _Stream(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("h", "e", "down", "cond", "up", "bias", "out")), ("rank", ctypes.c_int64),
    )  # fmt: skip


def stream_states(
    h: torch.Tensor, embeddings: torch.Tensor, streams: Sequence[PreparedStreams], counts: Sequence[int]
) -> torch.Tensor:
    """See `StreamStates`."""
    width = h.shape[1]
    if width % LANES:
        return torch_stream_states(h, embeddings, streams, counts)
    out = h.new_empty(sum(counts), width)
    h, embeddings = h.contiguous(), embeddings.contiguous()
    row_bytes, found = width * h.element_size(), list[_Stream]()
    for i, (own, count) in enumerate(zip(streams, counts, strict=True)):
        rank = own.rank
        down, bias = own.down.data_ptr(), own.bias.data_ptr()
        cond = own.cond.data_ptr() if own.cond is not None else None
        up = own.up.data_ptr() if own.up is not None else None
        for k in range(count):
            skip = k * rank * row_bytes
            found.append(
                _Stream(
                    h.data_ptr() + i * row_bytes, embeddings.data_ptr() + i * row_bytes, down + skip,
                    cond + skip if cond is not None else None, up + skip if up is not None else None,
                    bias + k * row_bytes, out.data_ptr() + len(found) * row_bytes, rank,
                )
            )  # fmt: skip
    most = max((-(-each.rank // LANES) * LANES for each in found), default=0)
    scratch = torch.empty(len(found), 2, most)
    table = (_Stream * len(found))(*found)
    _kernel("streams", h.dtype)(ctypes.addressof(table), len(found), width, scratch.data_ptr(), most)
    return out


def member_table(group: LinearGroup, expand: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """int64 [k, 3]: first column, width and expand's address of each sibling, as the kernel reads them; 0 = none has it."""
    rows, column = [], 0
    for size, weights in zip(group.sizes, expand, strict=True):
        rows.append((column, size, weights.data_ptr() if weights is not None else 0))
        column += size
    return torch.tensor(rows)
