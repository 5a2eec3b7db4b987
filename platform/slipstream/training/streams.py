"""The trainable speculators: Turbo streams (low-rank, dense, conditioned) and Medusa-1 heads (methods.md 1.2 and 7)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from slipstream.adapters.weights import StreamWeights


class TurboStreams(nn.Module):
    """K residual SiLU streams of the final hidden state; stream k of h_t predicts token t+2+k.

    Low rank: s_k = h + SiLU(B_k (A_k h + C_k e) + b_k); dense: s_k = h + SiLU(W_k h + b_k). Parameters are float32.
    At the start B (or W) and b are zero, so every stream is h itself, exactly; SiLU'(0) = 0.5 lets gradients through.
    `condition_scale` is folded into C on export: embeddings are much smaller than final hidden states, and Adam's step does
    not know.
    """

    def __init__(
        self,
        streams: int,
        hidden: int,
        rank: int | None,
        *,
        conditioned: bool,
        condition_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_streams, self.rank, self.condition_scale = streams, rank, condition_scale
        generator = torch.Generator().manual_seed(seed)

        def kaiming() -> nn.Parameter:
            bound = math.sqrt(3.0 / hidden)  # unit gain for the linear map in front of B
            assert rank is not None
            return nn.Parameter((torch.rand(streams, rank, hidden, generator=generator) * 2 - 1) * bound)

        self.bias = nn.Parameter(torch.zeros(streams, hidden))
        self.weight = nn.Parameter(torch.zeros(streams, hidden, hidden)) if rank is None else None
        self.a = kaiming() if rank is not None else None
        self.b = nn.Parameter(torch.zeros(streams, hidden, rank)) if rank is not None else None
        self.c = kaiming() if conditioned and rank is not None else None

    @property
    def conditioned(self) -> bool:
        """Whether `forward` wants embeddings."""
        return self.c is not None

    def forward(self, h: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """h: [N, H] final hidden states; embedding: [N, H] of each row's next token → states [K, N, H] in h's dtype."""
        if self.weight is not None:
            inner = torch.einsum("nh,koh->kno", h, self.weight.to(h.dtype))
        else:
            assert self.a is not None
            assert self.b is not None
            low = F.linear(h, self.a.flatten(0, 1).to(h.dtype))
            if self.c is not None:
                assert embedding is not None
                low = low + F.linear(embedding * self.condition_scale, self.c.flatten(0, 1).to(h.dtype))
            low = low.view(-1, self.num_streams, low.shape[-1] // self.num_streams).transpose(0, 1)
            inner = torch.bmm(low, self.b.to(h.dtype).transpose(1, 2))
        return h + F.silu(inner + self.bias.to(h.dtype).unsqueeze(1))

    @torch.no_grad()
    def start_from(self, weights: StreamWeights) -> bool:
        """Take over trained streams; False, and nothing changed, when they are of another shape."""
        c = None if weights.c is None else weights.c.float() / self.condition_scale
        pairs = (
            (self.bias, weights.bias), (self.weight, weights.weight), (self.a, weights.a), (self.b, weights.b), (self.c, c)
        )  # fmt: skip
        if any((mine is None) != (theirs is None) for mine, theirs in pairs) or weights.head is not None:
            return False
        both = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        if any(mine.shape != theirs.shape for mine, theirs in both):
            return False
        for mine, theirs in both:
            mine.copy_(theirs)
        return True

    def export(self, dtype: torch.dtype) -> StreamWeights:
        """The streams as the serving side reads them."""

        def cast(t: torch.Tensor | None, scale: float = 1.0) -> torch.Tensor | None:
            return None if t is None else (t.detach() * scale).to(dtype).cpu()

        bias = cast(self.bias)
        assert bias is not None
        return StreamWeights(bias, cast(self.weight), cast(self.a), cast(self.b), cast(self.c, self.condition_scale))


class MedusaHeads(TurboStreams):
    """Medusa-1: dense streams, each with an LM head of its own that starts as a copy of the base's (arXiv 2401.10774)."""

    def __init__(self, heads: int, lm_head: torch.Tensor) -> None:
        super().__init__(heads, lm_head.shape[1], None, conditioned=False)
        self.head = nn.Parameter(lm_head.detach().float().unsqueeze(0).repeat(heads, 1, 1))  # [K, V, H]

    def export(self, dtype: torch.dtype) -> StreamWeights:
        """As `TurboStreams.export`, with the heads."""
        dense = super().export(dtype)
        return StreamWeights(dense.bias, dense.weight, head=self.head.detach().to(dtype).cpu())
