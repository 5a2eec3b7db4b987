"""From sums over positions to the numbers people watch (names as in the Turbo LoRA announcement and Medusa's own logs)."""

from __future__ import annotations

import torch


def named_metrics(sums: torch.Tensor, streams: int, decay: float, *, chains: bool) -> dict[str, float]:
    """`ForwardSums.stacked`, added up → `loss`, `lora_loss`, `turbo_{k}_loss`, `turbo_{k}_top1`; with `chains` also
    `turbo_{k}_cond` (right, given that streams 0..k-1 were), `turbo_chain_{k}` (0..k all right), and the tokens per step
    with the first K streams, `expected_tokens_{K}`; `expected_tokens` with all.

    A chain weighs every position alike. Served steps start again where a draft failed, so at hard positions more often:
    `expected_tokens` counts the steps of such walks through the rows. It is the served figure where the rows' answers are
    the model's own, and near it where they are much alike.

    The denominators: each loss and top-1 its own positions; a chain all that have a target for all its streams.
    """
    losses, hits, counts, judged, chain, steps = (
        part.tolist() for part in torch.split(sums, [streams + 1] * 3 + [streams] * 3)
    )
    items = max(1.0, counts[0])
    found = {"lora_loss": losses[0] / items, "lora_top1": hits[0] / items}
    found["loss"] = (losses[0] + sum(decay ** (k + 1) * losses[k + 1] for k in range(streams))) / items
    for k in range(streams):
        of = max(1.0, counts[k + 1])
        found[f"turbo_{k}_loss"] = losses[k + 1] / of
        found[f"turbo_{k}_top1"] = hits[k + 1] / of
        if chains:
            found[f"turbo_chain_{k}"] = chain[k] / of
            # Of those right before that have a next target: a row's end is no failure.
            found[f"turbo_{k}_cond"] = chain[k] / max(1.0, judged[k])
            found[f"expected_tokens_{k + 1}"] = found["expected_tokens"] = counts[0] / max(1.0, steps[k])
    return found
