"""The forward of Llama-shaped decoders without their modules: the same arithmetic in half as many operations.

A decode step of a small model spends more time in calling modules and launching tiny operations than in arithmetic. For
the architectures named in `FLAT` the layers' weights are walked directly: q, k and v stay one tensor through projection and
rotary embedding, norms are one fused operation, residuals are added in place. Whether the result is transformers' own is
checked at start-up like everything else; other architectures go through their own modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from slipstream.engine.attention import AttentionRules, KVCache, PagedBatch
from slipstream.engine.linear import GroupMember, LinearGroup

FLAT = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (arXiv 1910.07467): normalised in float32, rounded, then scaled, as transformers does."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, None, self.eps).mul_(self.weight)


class Whole(Protocol):
    """All layers of a decoder and its last norm in one call."""

    def __call__(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], paged: PagedBatch
    ) -> torch.Tensor | None:
        """hidden: embeddings [n, H], which may be overwritten; rotary as in `TorchOps.rotate_store` → final hidden states
        [n, H]; None, and nothing touched, for a step that must go layer by layer."""
        ...


class TorchOps:
    """What lies between a layer's linears, by torch's own operations: everywhere, and the reference."""

    def add_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """hidden [n, H] += delta, in place → normalised [n, H], a tensor of its own."""
        if delta is not None:
            hidden += delta
        return norm(hidden)

    def rotate_store(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: tuple[Norm, Norm] | None,
        cache: KVCache,
        layer: int,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Norm (if any) and rotate queries and keys of qkv [n, heads + 2 kv_heads, D], which may be overwritten; keep keys
        and values in the cache → queries [heads, n, D]. rotary: cos and (-sin, sin) by halves, [n, D] each."""
        kv_heads, dim = cache.keys[layer].shape[0], qkv.shape[2]
        heads = qkv.shape[1] - 2 * kv_heads
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if norms is not None:
            qk = torch.cat([norms[0](qk[:, :heads]), norms[1](qk[:, heads:])], dim=1)
        # Rotary embedding (arXiv 2104.09864) by halves: rotate_half(x) * sin = roll(x) * (-sin, sin).
        cos, sin = (part.unsqueeze(1) for part in rotary)
        qk = (qk * cos).add_(qk.roll(dim // 2, -1).mul_(sin)).transpose(0, 1)
        cache.store(layer, slots, qk[heads:], v.transpose(0, 1))
        return qk[:heads]

    def gate(self, gate_up: torch.Tensor, act: nn.Module) -> torch.Tensor:
        """gate_up: [n, 2 I] → act(gate) up [n, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate).mul_(up)  # type: ignore[no-any-return]

    def whole(self, layers: Sequence[Layer], norm: Norm) -> Whole | None:
        """The decoder in one call, where there is such a kernel."""
        return None


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer computes with."""

    before: Norm
    qkv: LinearGroup
    norms: tuple[Norm, Norm] | None  # of queries and keys
    dim: int  # of a head
    rules: AttentionRules
    out: LinearGroup
    after: Norm
    gate_up: LinearGroup
    act: nn.Module
    down: LinearGroup


class FlatDecoder:
    """A decoder's forward, from input ids to final hidden states."""

    def __init__(
        self,
        embedding: nn.Module,
        rotary: nn.Module,
        layers: list[Layer],
        norm: Norm,
        ops: TorchOps,
        whole: bool = True,
    ) -> None:
        """`whole` False: layer by layer even where `ops` has them in one call."""
        self._embedding = embedding
        self._rotary = rotary
        self._layers = layers
        self._norm = norm
        self._ops = ops
        self._whole = ops.whole(layers, norm) if whole else None

    @staticmethod
    def of(decoder: Any, ops: TorchOps, whole: bool = True) -> FlatDecoder | None:
        """The flat form of a decoder whose linears are group members; None for an architecture that has none."""
        if type(decoder).__name__ not in FLAT or type(decoder).__module__.split(".")[0] != "transformers":
            return None
        layers = [_layer(layer) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
        return FlatDecoder(decoder.embed_tokens, decoder.rotary_emb, layers, _norm(decoder.norm), ops, whole)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, paged: PagedBatch) -> torch.Tensor:
        """ids, positions: int64 [n] → final hidden states [n, H]."""
        ops = self._ops
        hidden = self._embedding(ids)
        cos, sin = self._rotary(hidden.unsqueeze(0), position_ids=positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        rotary = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        if self._whole is not None:
            out = self._whole(hidden, rotary, paged)
            if out is not None:
                return out
        delta = None
        for i, layer in enumerate(self._layers):
            delta = self._attention(layer, i, ops.add_norm(hidden, delta, layer.before), rotary, paged)
            gate_up = layer.gate_up.whole(ops.add_norm(hidden, delta, layer.after))
            delta = layer.down.whole(ops.gate(gate_up, layer.act))
        return ops.add_norm(hidden, delta, self._norm)

    def _attention(
        self,
        layer: Layer,
        index: int,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        paged: PagedBatch,
    ) -> torch.Tensor:
        """x: normalised [n, H] → what attention adds to it [n, H]."""
        n, cache = x.shape[0], paged.cache
        qkv = layer.qkv.whole(x).view(n, -1, layer.dim)
        q = self._ops.rotate_store(qkv, rotary, layer.norms, cache, index, paged.slots)
        mixed = paged.layout.attend(q, cache.keys[index], cache.values[index], layer.rules)
        return layer.out.whole(mixed.reshape(n, -1))


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    qkv = _group(attention.q_proj, attention.k_proj, attention.v_proj)
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    if type(attention).__name__ == "LlamaAttention":
        window = None
    return Layer(
        before=_norm(layer.input_layernorm),
        qkv=qkv,
        norms=(_norm(q_norm), _norm(k_norm)) if q_norm is not None and k_norm is not None else None,
        dim=dim,
        rules=AttentionRules(float(attention.scaling), window, None),
        out=_group(attention.o_proj),
        after=_norm(layer.post_attention_layernorm),
        gate_up=_group(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=_group(mlp.down_proj),
    )


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight.data, norm.variance_epsilon)


def _group(*members: GroupMember) -> LinearGroup:
    """The group that these are all members of."""
    group = members[0].group
    assert all(m.group is group for m in members)
    assert len(group.names) == len(members)
    return group
