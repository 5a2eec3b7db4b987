"""The forward of Llama-shaped decoders without their modules: the same arithmetic in half as many operations.

A decode step of a small model spends more time in calling modules and launching tiny operations than in arithmetic. For
the architectures named in `FLAT` the layers' weights are walked directly: q, k and v stay one tensor through projection and
rotary embedding, norms are one fused operation, residuals are added in place. Whether the result is transformers' own is
checked at start-up like everything else; other architectures go through their own modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from slipstream.engine.attention import AttentionRules, PagedBatch
from slipstream.engine.linear import GroupMember, LinearGroup

FLAT = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})


@dataclass(frozen=True, slots=True)
class _Norm:
    """RMSNorm (arXiv 1910.07467): normalised in float32, rounded, then scaled, as transformers does."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, None, self.eps).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one layer computes with."""

    before: _Norm
    qkv: LinearGroup
    q_norm: _Norm | None
    k_norm: _Norm | None
    heads: tuple[int, int, int]  # query heads, KV heads, head dimension
    rules: AttentionRules
    out: LinearGroup
    after: _Norm
    gate_up: LinearGroup
    act: nn.Module
    down: LinearGroup


class FlatDecoder:
    """A decoder's forward, from input ids to final hidden states."""

    def __init__(self, embedding: nn.Module, rotary: nn.Module, layers: list[_Layer], norm: _Norm) -> None:
        self._embedding = embedding
        self._rotary = rotary
        self._layers = layers
        self._norm = norm

    @staticmethod
    def of(decoder: Any) -> FlatDecoder | None:
        """The flat form of a decoder whose linears are group members; None for an architecture that has none."""
        if type(decoder).__name__ not in FLAT or type(decoder).__module__.split(".")[0] != "transformers":
            return None
        layers = [_layer(layer) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
        return FlatDecoder(decoder.embed_tokens, decoder.rotary_emb, layers, _norm(decoder.norm))

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, paged: PagedBatch) -> torch.Tensor:
        """ids, positions: int64 [n] → final hidden states [n, H]."""
        hidden = self._embedding(ids)
        cos, sin = self._rotary(hidden.unsqueeze(0), position_ids=positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        cos = cos[0].unsqueeze(1)  # [n, 1, D]
        sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1).unsqueeze(1)  # of the half that comes in negated
        for i, layer in enumerate(self._layers):
            hidden += _attention(layer, i, layer.before(hidden), cos, sin, paged)
            gate, up = layer.gate_up.split(layer.gate_up.whole(layer.after(hidden)))
            hidden += layer.down.whole(layer.act(gate).mul_(up))
        return self._norm(hidden)


def _attention(
    layer: _Layer, index: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, paged: PagedBatch
) -> torch.Tensor:
    """x: normalised [n, H] → what attention adds to it [n, H]."""
    heads, kv_heads, dim = layer.heads
    n = x.shape[0]
    qkv = layer.qkv.whole(x).view(n, heads + 2 * kv_heads, dim)
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if layer.q_norm is not None and layer.k_norm is not None:
        qk = torch.cat([layer.q_norm(qk[:, :heads]), layer.k_norm(qk[:, heads:])], dim=1)
    # Rotary embedding (arXiv 2104.09864) by halves: rotate_half(x) * sin = roll(x) * (-sin, sin).
    qk = (qk * cos).add_(qk.roll(dim // 2, -1).mul_(sin)).transpose(0, 1)
    paged.cache.store(index, paged.slots, qk[heads:], v.transpose(0, 1))
    cache = paged.cache
    mixed = paged.layout.attend(qk[:heads], cache.keys[index], cache.values[index], layer.rules)
    return layer.out.whole(mixed.reshape(n, heads * dim))


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    qkv = _group(attention.q_proj, attention.k_proj, attention.v_proj)
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    if type(attention).__name__ == "LlamaAttention":
        window = None
    return _Layer(
        before=_norm(layer.input_layernorm),
        qkv=qkv,
        q_norm=_norm(q_norm) if q_norm is not None else None,
        k_norm=_norm(k_norm) if k_norm is not None else None,
        heads=(qkv.sizes[0] // dim, qkv.sizes[1] // dim, dim),
        rules=AttentionRules(float(attention.scaling), window, None),
        out=_group(attention.o_proj),
        after=_norm(layer.post_attention_layernorm),
        gate_up=_group(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=_group(mlp.down_proj),
    )


def _norm(norm: Any) -> _Norm:
    return _Norm(norm.weight.data, norm.variance_epsilon)


def _group(*members: GroupMember) -> LinearGroup:
    """The group that these are all members of."""
    group = members[0].group
    assert all(m.group is group for m in members)
    assert len(group.names) == len(members)
    return group
