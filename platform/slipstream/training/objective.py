"""The joint objective of a Turbo LoRA (methods.md 1.3): one pass over the frozen LM head for the LoRA and all streams.

    L = L_lm + Σ_k γ^(k+1) L_k,   L_k = (1-β) CE(z^k_t, y_{t+2+k}) + β CE(softmax(z_{t+1+k}), z^k_t)

where z = LMHead(h), z^k = LMHead(s_k) and z_{t+1+k} is the tuned model's own prediction of the same token: what
verification will compare with. Every term is divided by the same number of trained tokens.

Full logits are never kept: `_HeadLoss` walks over chunks of positions and keeps only gradients with respect to the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from slipstream.training.data import IGNORE

# Bytes of one float32 copy of the logits that exist at once; two such buffers are kept.
CPU_CHUNK_BYTES = 64 << 20
CUDA_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Positions:
    """Where a batch is trained. `rows`: flat index of every t whose next token is trained [N], in order; `next_ids`: that
    token [N]; `reach`: how many of the following tokens are trained without a break [N]; stream k has one iff reach > k."""

    rows: torch.Tensor
    next_ids: torch.Tensor
    reach: torch.Tensor

    def has_target(self, stream: int) -> torch.Tensor:
        """Bool [N]: whether token t+2+stream is trained, in the same row, with every token between."""
        return self.reach > stream

    def target(self, stream: int) -> torch.Tensor:
        """int64 [N]: token t+2+stream; only meaningful where `has_target`."""
        return self.next_ids.roll(-(1 + stream))


@dataclass(frozen=True, slots=True)
class Chains:
    """Drafts as a step uses them, all int64 [K]. judged: positions where streams 0..k-1 were right and stream k has a target;
    right: those where k was right too; steps: what all answers take with the first k+1 streams, prefill's own included."""

    judged: torch.Tensor
    right: torch.Tensor
    steps: torch.Tensor


def find_chains(correct: torch.Tensor, positions: Positions, *, walk: bool) -> Chains:
    """correct: bool [K, N], stream k right at position i; positions: found with a `max_reach` over K. Without `walk` the
    steps, which take a loop, are zeros."""
    if not correct.shape[0]:
        none = torch.zeros(0, dtype=torch.long, device=correct.device)
        return Chains(none, none, none)
    right = correct.cumprod(0)
    has = torch.stack([positions.has_target(k) for k in range(correct.shape[0])])
    judged = torch.cat([torch.ones_like(right[:1]), right[:-1]]) * has
    steps = [0] * correct.shape[0]
    if walk:
        reach = positions.reach.tolist()
        accepted = right.cumsum(0).tolist()  # row k: drafts that the first k+1 streams get accepted
        steps = [_steps(line, reach) for line in accepted]
    return Chains(judged.sum(1), right.sum(1), torch.tensor(steps, device=correct.device))


def _steps(accepted: list[int], reach: list[int]) -> int:
    """A step at position i emits its accepted drafts and one token more; the next one begins at the last one's position."""
    steps, i = 0, 0
    while i < len(reach):
        steps += 1  # an answer begins: prefill emits its first token
        while reach[i] > 0:
            left = reach[i] - accepted[i]
            i += accepted[i] + (left > 0)
            steps += 1
        i += 1
    return steps


def find_positions(labels: torch.Tensor, segments: torch.Tensor, max_reach: int) -> Positions:
    """labels, segments: int64 [packs, length], as in `PackedBatch`."""
    trained = torch.zeros_like(labels, dtype=torch.bool)
    trained[:, :-1] = (labels[:, 1:] != IGNORE) & (segments[:, 1:] == segments[:, :-1])
    rows = trained.flatten().nonzero().squeeze(1)
    next_ids = labels.flatten()[(rows + 1).clamp(max=labels.numel() - 1)]
    # Consecutive flat indices that are both trained lie in one segment: t's own condition ties t+1 to it.
    goes_on = torch.zeros_like(rows, dtype=torch.bool)
    goes_on[:-1] = rows[1:] == rows[:-1] + 1
    reach = torch.zeros_like(rows)
    alive = torch.ones_like(goes_on)
    for step in range(max_reach):
        alive = alive & _shifted(goes_on, step)
        reach += alive
    return Positions(rows, next_ids, reach)


def _shifted(flags: torch.Tensor, by: int) -> torch.Tensor:
    """flags[i + by], False past the end."""
    return F.pad(flags[by:], (0, min(by, flags.shape[0]))) if by else flags


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a model does to its logits besides the linear map: a factor, then a soft cap (Gemma 2), cap · tanh(z / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> HeadShape:
        """Read from a transformers text config."""
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def apply(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits as the model gives them."""
        z = raw * self.scale
        return torch.tanh(z / self.softcap) * self.softcap if self.softcap else z

    def slope(self, z: torch.Tensor) -> torch.Tensor:
        """d z / d raw, from z."""
        return torch.full_like(z, self.scale) if not self.softcap else self.scale * (1 - (z / self.softcap) ** 2)

    @property
    def plain(self) -> bool:
        """Whether it does nothing."""
        return self.scale == 1.0 and not self.softcap


@dataclass(frozen=True, slots=True)
class ObjectiveSums:
    """Sums over positions. losses: [K+1], the LM's first, differentiable; correct: bool [K+1, N] by label (row 0: the LM's
    token t+1; row k+1: stream k's token t+2+k); counts: [K+1] positions with a target."""

    losses: torch.Tensor
    correct: torch.Tensor
    counts: torch.Tensor


def head_losses(
    h: torch.Tensor,
    streams: torch.Tensor | None,
    positions: Positions,
    weight: torch.Tensor,
    shape: HeadShape,
    soft_targets: float,
    *,
    own_heads: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
) -> ObjectiveSums:
    """h: [N, H] states at `positions`; streams: [K, N, H] or None; weight: [V, H], frozen; own_heads: [K, V, H] or None;
    draft_ids: sorted int64 [U] with every target among them, or None for all: what the streams' softmax (and their soft
    target) runs over. L_lm runs over the whole vocabulary unless h wants no gradient: then it is only told, not trained.

    The backward pass reaches h (through L_lm alone; the soft target is a constant), streams and own_heads.
    """
    if streams is None:
        streams = h.new_empty(0, *h.shape)
    call = _Call(positions, weight, bias, shape, soft_targets, draft_ids)
    losses, correct = _HeadLoss.apply(h, streams, own_heads, call)  # type: ignore[no-untyped-call]
    counts = [positions.rows.numel(), *(int(positions.has_target(k).sum()) for k in range(streams.shape[0]))]
    return ObjectiveSums(losses, correct, torch.tensor(counts, device=h.device))


@dataclass(frozen=True, slots=True)
class _Call:
    """What `_HeadLoss` is given besides what it differentiates."""

    positions: Positions
    weight: torch.Tensor
    bias: torch.Tensor | None
    shape: HeadShape
    beta: float
    draft_ids: torch.Tensor | None

    def stream_head(self, own: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows of the LM head (or of a head of its own) that a stream's softmax runs over, and their bias."""
        weight = self.weight if own is None else own.to(dtype)
        if self.draft_ids is None:
            return weight, self.bias
        return weight[self.draft_ids], None if self.bias is None else self.bias[self.draft_ids]

    def place(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens as indices into what a stream's softmax runs over."""
        if self.draft_ids is None:
            return ids
        return torch.searchsorted(self.draft_ids, ids).clamp_(max=len(self.draft_ids) - 1)

    def teacher(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tuned model's distribution over what a stream's softmax runs over. p: [n, V], or [n, U] already."""
        if self.draft_ids is None or p.shape[1] == len(self.draft_ids):
            return p
        kept = p.index_select(1, self.draft_ids)
        return kept / kept.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)


class _HeadLoss(torch.autograd.Function):
    """Chunked softmax cross-entropy through the LM head, its gradient worked out on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, streams: torch.Tensor, own_heads: torch.Tensor | None, call: _Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_streams, n = streams.shape[:2]
        positions, beta = call.positions, call.beta
        want_h, want_s, want_w = ctx.needs_input_grad[:3]
        shared = call.stream_head(None, h.dtype)
        # An LM that is not trained is only the streams' teacher, and a teacher needs no more than they.
        weight, bias = (call.weight, call.bias) if want_h else shared
        next_ids = positions.next_ids if want_h else call.place(positions.next_ids)
        size = _chunk(h, weight.shape[0])
        scratch = _Scratch.like(h, size + num_streams, weight.shape[0])
        stream_scratch = _Scratch.like(h, size, shared[0].shape[0])
        losses = torch.zeros(num_streams + 1, dtype=scratch.logp.dtype, device=h.device)
        correct = torch.zeros(num_streams + 1, n, dtype=torch.bool, device=h.device)
        grad_h = torch.zeros_like(h) if want_h else None
        grad_s = torch.zeros_like(streams) if want_s else None
        grad_w = torch.zeros_like(own_heads) if want_w and own_heads is not None else None
        for start in range(0, n, size):
            end = min(n, start + size)
            here = slice(start, end)
            soft = beta > 0 and num_streams > 0
            # Teachers of the chunk's last positions lie beyond it.
            ahead = slice(start, min(n, end + num_streams)) if soft else here
            head = _Head(weight, bias, call.shape, scratch)
            p, z, loss, hit = head.forward(h[ahead], next_ids[ahead])
            losses[0] += loss[: end - start].sum()
            correct[0, here] = hit[: end - start]
            teacher = call.teacher(p, h.dtype) if soft else None
            if grad_h is not None:
                grad_h[here] = head.backward(p[: end - start], z, next_ids[here], 1.0)
            for k in range(num_streams):
                # Every position of the chunk is computed: the few without a target cost less than picking out the others.
                there = positions.has_target(k)[here]
                target = call.place(positions.target(k))[here]
                own_head = shared if own_heads is None else call.stream_head(own_heads[k], h.dtype)
                head = _Head(*own_head, call.shape, stream_scratch)
                own = teacher[1 + k : 1 + k + end - start] if teacher is not None else None  # of position t: t+1+k
                pk, zk, loss, hit = head.forward(streams[k, here], target, own, beta)
                losses[k + 1] += loss.masked_fill_(~there, 0.0).sum()
                correct[k + 1, here] = hit & there
                if grad_s is None:
                    continue
                if own is not None:
                    pk[: own.shape[0]].sub_(own, alpha=beta)
                grad_s[k, here] = head.backward(pk, zk, target, 1 - beta, ~there)
                if grad_w is not None:
                    grad = (head.grad.t() @ streams[k, here]).to(grad_w.dtype)
                    if call.draft_ids is None:
                        grad_w[k] += grad
                    else:
                        grad_w[k].index_add_(0, call.draft_ids, grad)
        ctx.grads = (grad_h, grad_s, grad_w)
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        by_loss = grads[0]
        assert by_loss is not None
        grad_h, grad_s, grad_w = ctx.grads
        by_stream = by_loss[1:].view(-1, 1, 1)
        return (
            None if grad_h is None else grad_h * by_loss[0].to(grad_h.dtype),
            None if grad_s is None else grad_s * by_stream.to(grad_s.dtype),
            None if grad_w is None else grad_w * by_stream.to(grad_w.dtype),
            None,
        )


def _chunk(h: torch.Tensor, vocab: int) -> int:
    budget = CUDA_CHUNK_BYTES if h.is_cuda else CPU_CHUNK_BYTES
    return min(max(16, budget // (4 * vocab)), max(1, h.shape[0]))


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Buffers used again for every chunk: on a CPU a fresh one costs more in page faults than the softmax it is for.

    raw: [rows, V] in the states' dtype; logp: the same in float32 (float64 for float64 states).
    """

    raw: torch.Tensor
    logp: torch.Tensor

    @classmethod
    def like(cls, h: torch.Tensor, rows: int, vocab: int) -> _Scratch:
        exact = torch.float64 if h.dtype is torch.float64 else torch.float32
        raw = torch.empty(rows, vocab, dtype=h.dtype, device=h.device)
        return cls(raw, torch.empty(rows, vocab, dtype=exact, device=h.device))


class _Head:
    """One LM head on one chunk of states."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, shape: HeadShape, scratch: _Scratch) -> None:
        self._weight, self._bias, self._shape, self._scratch = weight, bias, shape, scratch

    def forward(
        self,
        states: torch.Tensor,
        target: torch.Tensor,
        own: torch.Tensor | None = None,
        beta: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """states: [n, H]; target: [n]; own: the teacher's probabilities of the first rows [≤ n, V] → probabilities [n, V]
        in the scratch buffer, the logits if `backward` needs them, the loss [n], whether the target is likeliest [n]."""
        n = states.shape[0]
        raw = torch.mm(states, self._weight.t(), out=self._scratch.raw[:n])
        if self._bias is not None:
            raw += self._bias
        into = self._scratch.logp[:n]
        z = None if self._shape.plain else self._shape.apply(raw.to(into.dtype))
        logp = torch.log_softmax(raw if z is None else z, -1, dtype=into.dtype, out=into)
        picked = logp.gather(1, target.unsqueeze(1)).squeeze(1)
        loss = -picked
        if own is not None:
            loss = (1 - beta) * loss
            loss[: own.shape[0]] -= beta * torch.bmm(own.unsqueeze(1), logp[: own.shape[0]].unsqueeze(2)).flatten()
        hit = picked >= logp.amax(dim=1)
        return logp.exp_(), z, loss, hit

    def backward(
        self,
        p: torch.Tensor,
        z: torch.Tensor | None,
        target: torch.Tensor,
        hard: float,
        without: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient with respect to the states [n, H], for d loss / d logits = p - hard · onehot(target).

        It is zero for rows `without`. The target's entry is worked out before rounding: in bfloat16 first p and then 1 - p
        would lose most of it.
        """
        rows = torch.arange(p.shape[0], device=p.device)
        at_target = p[rows, target] - hard
        if z is not None:
            factor = self._shape.slope(z[: p.shape[0]])
            at_target = at_target * factor[rows, target]
            p = p * factor
        self.grad = self._scratch.raw[: p.shape[0]].copy_(p)
        self.grad[rows, target] = at_target.to(self.grad.dtype)
        if without is not None:
            self.grad[without] = 0
        return self.grad @ self._weight
