"""An adapter's weights in canonical form, whatever layout they came in. CPU tensors; the engine moves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One target module's low-rank update: y = W x + scale · B (A x), or DoRA's magnitude form of it.

    a: [rank, in_features]; b: [out_features, rank]; magnitude: DoRA's `m` [out_features] or None.
    `scale` is alpha/r, or alpha/sqrt(r) for rsLoRA (arXiv 2312.03732), with rank and alpha patterns applied.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class StreamWeights:
    """K residual SiLU streams of the final hidden state; stream k of h_t drafts token t+2+k (methods.md 1.2).

    Dense: weight [K, H, H], s_k = h + SiLU(W_k h + b_k). Low rank: a [K, R, H], b [K, H, R] and perhaps c [K, R, H]
    (conditioned on the embedding e of the token just sampled): s_k = h + SiLU(B_k (A_k h + C_k e) + b_k).
    bias: [K, H]. Exactly one of `weight` and (`a`, `b`) is set.

    head: LM heads of the streams' own [K, V, H] (Medusa-1, dense only); None: the streams share the base's.
    """

    bias: torch.Tensor
    weight: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    c: torch.Tensor | None = None
    head: torch.Tensor | None = None

    @property
    def num_streams(self) -> int:
        """K."""
        return self.bias.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Everything the engine needs of one adapter version."""

    lora: Mapping[str, LoraModule]  # module path in the base model -> its update
    streams: StreamWeights | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, for the residency budgets."""
        parts: list[torch.Tensor | None] = []
        for m in self.lora.values():
            parts += [m.a, m.b, m.magnitude]
        if self.streams is not None:
            s = self.streams
            parts += [s.bias, s.weight, s.a, s.b, s.c, s.head]
        return sum(t.numel() * t.element_size() for t in parts if t is not None)
