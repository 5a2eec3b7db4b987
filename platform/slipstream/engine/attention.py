"""Attention over the paged KV cache, registered once through transformers' attention interface.

A step's tokens are one flat row [1, n]; which sequence a token belongs to, its block table and its position travel in a
`PagedBatch`. Layout of the cache, per layer: [kv_heads, blocks, block_size, head_dim], so that gathering a sequence's
blocks gives a contiguous [kv_heads, batch, length, head_dim] with no further copy (CPU caches like that, methods.md 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slipstream.errors import ModelUnsupported

if TYPE_CHECKING:
    from slipstream.engine.plan import BlockCopy

_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position"})  # already in the rotary embedding
ATTENTION_NAME = "slipstream_paged"
SCORE_TILE = 1 << 22  # scores held at a time, so that a long prefill chunk does not materialise hundreds of megabytes


class KVCache:
    """Keys and values of every layer. Owned by the runner; blocks are handed out by the scheduler's `BlockPool`."""

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        spare_blocks: int = 0,
    ) -> None:
        """shapes: (kv_heads, head_dim) of each layer. `spare_blocks` lie behind the others: for rows of nobody."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        blocks = num_blocks + spare_blocks
        self.keys = [torch.zeros(h, blocks, block_size, d, dtype=dtype, device=device) for h, d in shapes]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks [kv_heads, block_size, D] of every layer, all from what was there before."""
        sources, targets = torch.tensor(copies, device=self.keys[0].device).unbind(1)
        for cached in (*self.keys, *self.values):
            cached.index_copy_(1, targets, cached.index_select(1, sources))

    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the keys and values [kv_heads, n, D] of rows. slots: int64 [n], block * size + offset of each."""
        keys, values = self.keys[layer], self.values[layer]
        keys.view(keys.shape[0], -1, keys.shape[-1]).index_copy_(1, slots, key.to(keys.dtype))
        # A stale value is multiplied by a weight of zero, which only a finite one survives: an adapter that overflows must
        # not leave anything in a block that the next owner can trip over. (Masked keys are overwritten with -inf.)
        finite = torch.nan_to_num(value.to(values.dtype))
        values.view(values.shape[0], -1, values.shape[-1]).index_copy_(1, slots, finite)


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """What the model asks of attention besides causality. window: keys a query sees, itself included; None = all."""

    scaling: float
    window: int | None
    softcap: float | None


class AttentionLayout(Protocol):
    """Which keys each row of a step sees, in the form that an attention kernel wants."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        """query: [heads, n, D]; keys, values: one layer's cache [kv_heads, blocks, block_size, D] → [n, heads, D]."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Sequences of a step that are attended together, padded to the longest. All index tensors are int64 on the device.

    rows: [B * Q] token row of each query (padding repeats the last one); positions: [B, Q]; tables: [B * W] blocks, or the
    first block of one sequence whose blocks lie side by side. seen: every query sees the first `seen` keys.
    out_rows: token rows [m] and out_places: their places [m] in the padded [B * Q] result. These and `rows` are None when the
    segment is the whole step, row by row. masks: by sliding window; the layers of a step share them.
    """

    rows: torch.Tensor | None
    positions: torch.Tensor
    tables: torch.Tensor | int
    length: int  # keys looked at: W * block_size
    seen: int
    out_rows: torch.Tensor | None
    out_places: torch.Tensor | None
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One step, as attention sees it. slots: int64 [n], where each token's key and value go: block * size + offset."""

    cache: KVCache
    slots: torch.Tensor
    layout: AttentionLayout


@dataclass(frozen=True, slots=True)
class Segments:
    """Attention by gathering each sequence's keys and plain matrix products: for processors, and the reference."""

    segments: tuple[Segment, ...]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        """See `AttentionLayout`."""
        out = None
        for segment in self.segments:
            part = _attend(query, keys, values, segment, rules)
            if segment.out_rows is None or segment.out_places is None:
                out = part
            else:
                out = query.new_empty(*query.shape[:2], values.shape[-1]) if out is None else out
                out[:, segment.out_rows] = part[:, segment.out_places]
        assert out is not None
        return out.transpose(0, 1)


def _hidden(segment: Segment, window: int | None) -> torch.Tensor:
    """Bool [1, B, 1, Q, L or its last part]: not (key position at or before the query's, inside the sliding window)."""
    mask = segment.masks.get(window)
    if mask is None:
        first = segment.seen if window is None else 0
        keys = torch.arange(first, segment.length, device=segment.positions.device)
        at = segment.positions.unsqueeze(-1)
        mask = keys > at
        if window is not None:
            mask |= keys <= at - window
        mask = mask[None, :, None]
        segment.masks[window] = mask
    return mask


def _gather(cache: torch.Tensor, segment: Segment) -> torch.Tensor:
    """[kv_heads * B, L, D] of one layer's keys or values."""
    heads, _, size, dim = cache.shape
    if isinstance(segment.tables, int):
        return cache[:, segment.tables : segment.tables + segment.length // size].view(heads, segment.length, dim)
    return cache.index_select(1, segment.tables).view(heads * segment.positions.shape[0], segment.length, dim)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segment: Segment, rules: AttentionRules
) -> torch.Tensor:
    """query: [heads, n, D]; keys, values: one layer's cache → [heads, B * Q, D]. Query heads of a KV group are folded into
    query rows, so that each key is read once a group.

    One algorithm for one row and for a thousand: decode, verification and prefill must round alike, or bf16 text would
    depend on how a request was chunked. For the same reason L is always whole blocks: a softmax over 37 keys and one over
    the same 37 padded to 48 add up in a different order.
    """
    heads, _, dim = query.shape
    batch, num_queries = segment.positions.shape
    kv_heads, length = keys.shape[0], segment.length
    group = heads // kv_heads
    q = query if segment.rows is None else query.index_select(1, segment.rows)
    q = q.reshape(kv_heads, group, batch, num_queries, dim).transpose(1, 2)
    k, v = _gather(keys, segment).transpose(1, 2), _gather(values, segment)
    hidden = _hidden(segment, rules.window)
    tile = max(1, SCORE_TILE // (heads * batch * length))
    outs = []
    for start in range(0, num_queries, tile):
        rows = q[:, :, :, start : start + tile]
        width = rows.shape[3]
        rows = rows.reshape(kv_heads * batch, group * width, dim)
        if query.dtype == torch.float16:  # unscaled products overflow its range
            scores = torch.bmm(rows * rules.scaling, k).float()
        else:
            scores = torch.bmm(rows, k).float().mul_(rules.scaling)
        if rules.softcap is not None:
            scores = torch.tanh(scores / rules.softcap).mul_(rules.softcap)
        scores = scores.view(kv_heads, batch, group, width, length)
        masked = scores[..., length - hidden.shape[-1] :]
        masked.masked_fill_(hidden[:, :, :, start : start + tile], float("-inf"))
        weights = scores.softmax(dim=-1).to(query.dtype).view(kv_heads * batch, group * width, length)
        outs.append(torch.bmm(weights, v).view(kv_heads, batch, group, width, dim))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)
    return out.transpose(1, 2).reshape(heads, batch * num_queries, dim)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls in each layer.

    query: [1, heads, n, D]; key, value: [1, kv_heads, n, D], rotary already applied. Returns [1, n, heads, D].
    `paged` in kwargs is the step's `PagedBatch`; `sliding_window` and `softcap` come from the model.
    """
    batch: PagedBatch = kwargs["paged"]
    foreign = sorted(n for n, v in kwargs.items() if isinstance(v, torch.Tensor) and n not in _HARMLESS_TENSORS)
    if foreign:
        raise ModelUnsupported(f"This model's attention needs {', '.join(foreign)}, which paged attention does not do.")
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every transformers attention module has one
    rules = AttentionRules(
        float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        kwargs.get("sliding_window"),
        kwargs.get("softcap"),
    )
    cache = batch.cache
    cache.store(layer, batch.slots, key[0], value[0])
    return batch.layout.attend(query[0], cache.keys[layer], cache.values[layer], rules).unsqueeze(0), None


def register() -> str:
    """Make the function known to transformers; no mask function goes with it, so models build no masks."""
    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
    return ATTENTION_NAME
