"""Turbo streams: each adapter's own small speculator over the base LM head (methods.md 1.2, after Medusa, arXiv 2401.10774).

Stream k of the hidden state h_t drafts token t+2+k. They run only at the last accepted row of each sequence. A Medusa-1
adapter's streams have LM heads of their own, which score its rows instead of the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch.nn import functional as F

from slipstream.adapters.weights import StreamWeights
from slipstream.engine.packed import pack


@dataclass(frozen=True, slots=True)
class OwnHead:
    """One stream's own LM head at work. weight: [V, H], perhaps packed; rows: those of the stream states it scores."""

    weight: torch.Tensor
    rows: list[int]


@dataclass(frozen=True, slots=True)
class PreparedStreams:
    """One adapter's streams in the engine's dtype. down: [K * R, H] (dense: [K * H, H]); up: [K, H, R] or None;
    cond: [K * R, H] or None; bias: [K, H]; heads: K own LM heads [V, H], or none."""

    down: torch.Tensor
    up: torch.Tensor | None
    cond: torch.Tensor | None
    bias: torch.Tensor
    heads: tuple[torch.Tensor, ...] = ()

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [t for t in (self.down, self.up, self.cond, self.bias, *self.heads) if t is not None]

    @property
    def rank(self) -> int:
        """R; of dense streams H."""
        return self.down.shape[0] // self.bias.shape[0]

    def to(self, device: torch.device) -> PreparedStreams:
        """The same on a device; nothing is copied when it is there already."""
        up = self.up.to(device) if self.up is not None else None
        cond = self.cond.to(device) if self.cond is not None else None
        heads = tuple(head.to(device) for head in self.heads)
        return PreparedStreams(self.down.to(device), up, cond, self.bias.to(device), heads)

    def packed(self) -> PreparedStreams:
        """The same with its LM heads laid out for this CPU, as the base's is; only for an engine that runs on it."""
        return replace(self, heads=tuple(pack(head) for head in self.heads))

    def hidden(self, h: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
        """h: [m, H] final hidden states; embedding: [m, H] of the tokens just decided → stream states [m, K, H]."""
        num_streams = self.bias.shape[0]
        inner = F.linear(h, self.down)
        if self.cond is not None:
            assert embedding is not None
            inner = inner + F.linear(embedding, self.cond)
        inner = inner.view(h.shape[0], num_streams, -1)
        if self.up is not None:
            inner = torch.einsum("mkr,khr->mkh", inner, self.up)
        return h.unsqueeze(1) + F.silu(inner + self.bias)


def prepare_streams(weights: StreamWeights, like: torch.Tensor) -> PreparedStreams:
    """Lay one adapter's streams out for the bank."""
    bias = weights.bias.to(like)
    if weights.weight is not None:
        heads = tuple(weights.head.to(like).unbind()) if weights.head is not None else ()
        return PreparedStreams(weights.weight.to(like).flatten(0, 1).contiguous(), None, None, bias, heads)
    assert weights.a is not None
    assert weights.b is not None
    cond = weights.c.to(like).flatten(0, 1).contiguous() if weights.c is not None else None
    return PreparedStreams(weights.a.to(like).flatten(0, 1).contiguous(), weights.b.to(like), cond, bias)


class StreamStates(Protocol):
    """How stream states are computed."""

    def __call__(
        self, h: torch.Tensor, embeddings: torch.Tensor, streams: Sequence[PreparedStreams], counts: Sequence[int]
    ) -> torch.Tensor:
        """h, embeddings: [m, H]; of row i the first `counts[i]` of `streams[i]`, flattened row by row → [sum(counts), H]."""
        ...


def torch_stream_states(
    h: torch.Tensor, embeddings: torch.Tensor, streams: Sequence[PreparedStreams], counts: Sequence[int]
) -> torch.Tensor:
    """`StreamStates` by torch's operations: all streams of each adapter at once."""
    out = h.new_empty(sum(counts), h.shape[1])
    starts = [0, *accumulate(counts)]
    rows_of: dict[int, list[int]] = {}
    for i, own in enumerate(streams):
        rows_of.setdefault(id(own), []).append(i)
    for rows in rows_of.values():
        states = streams[rows[0]].hidden(h[rows], embeddings[rows])
        for j, i in enumerate(rows):
            out[starts[i] : starts[i + 1]] = states[j, : counts[i]]
    return out


class StreamBank:
    """Streams of the resident adapters, by slot. Owned by the runner."""

    def __init__(self, states: StreamStates = torch_stream_states) -> None:
        self._states = states
        self._streams: dict[int, PreparedStreams] = {}
        self._with_heads: set[int] = set()  # slots

    def load(self, slot: int, streams: PreparedStreams | None) -> None:
        """Put an adapter's streams into a slot; None for an adapter without."""
        if streams is not None:
            self._streams[slot] = streams
            if streams.heads:
                self._with_heads.add(slot)

    def unload(self, slot: int) -> None:
        """Empty a slot."""
        self._streams.pop(slot, None)
        self._with_heads.discard(slot)

    def hidden(
        self, h: torch.Tensor, embeddings: torch.Tensor, slots: Sequence[int], counts: Sequence[int]
    ) -> torch.Tensor:
        """See `StreamStates`; `slots[i]`: whose streams row i has."""
        return self._states(h, embeddings, [self._streams[slot] for slot in slots], counts)

    def own_heads(self, slots: Sequence[int], counts: Sequence[int]) -> list[OwnHead]:
        """The own LM heads that score rows of what `hidden` gives for the same arguments; the other rows are the base's."""
        if self._with_heads.isdisjoint(slots):
            return []
        starts = [0, *accumulate(counts)]
        found = []
        for slot in self._with_heads.intersection(slots):
            for k, weight in enumerate(self._streams[slot].heads):
                rows = [starts[i] + k for i, s in enumerate(slots) if s == slot and counts[i] > k]
                if rows:
                    found.append(OwnHead(weight, rows))
        return found
