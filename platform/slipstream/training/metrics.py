"""From sums over positions to the numbers people watch (names as in the Turbo LoRA announcement and Medusa's own logs)."""

from __future__ import annotations

import torch


def named_metrics(sums: torch.Tensor, streams: int, decay: float, *, chains: bool) -> dict[str, float]:
    """`ForwardSums.stacked`, added up → `loss`, `lora_loss`, `turbo_{k}_loss`, `turbo_{k}_top1`; with `chains` also
    `turbo_{k}_cond` (right, given that streams 0..k-1 were), `turbo_chain_{k}` (0..k all right), `expected_tokens` per step.

    `expected_tokens` weighs every position alike. Served steps start again where a draft failed, so they begin at hard
    positions more often and emit fewer: it ranks runs of one task, and the served figure is `slipstream evaluate`'s.

    The denominators: each loss and top-1 its own positions; a chain all trained positions, since a step may start at any.
    """
    losses, hits, counts, chain = (part.tolist() for part in torch.split(sums, [streams + 1] * 3 + [streams]))
    items = max(1.0, counts[0])
    found = {"lora_loss": losses[0] / items, "lora_top1": hits[0] / items}
    found["loss"] = (losses[0] + sum(decay ** (k + 1) * losses[k + 1] for k in range(streams))) / items
    before = items
    expected = 1.0
    for k in range(streams):
        of = max(1.0, counts[k + 1])
        found[f"turbo_{k}_loss"] = losses[k + 1] / of
        found[f"turbo_{k}_top1"] = hits[k + 1] / of
        if chains:
            found[f"turbo_{k}_cond"] = chain[k] / max(1.0, before)
            found[f"turbo_chain_{k}"] = chain[k] / items
            before = chain[k]
            expected += chain[k] / items
    if chains and streams:
        found["expected_tokens"] = expected
    return found
