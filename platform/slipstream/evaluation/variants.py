"""The ways one adapter can answer, which an evaluation compares."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.adapters.turbo_config import MAX_STREAMS
from slipstream.adapters.weights import AdapterWeights

BASE = "base"


@dataclass(frozen=True, slots=True)
class Variant:
    """A name for the tables, the engine's name of the adapter (None = base model), and the most drafts a step."""

    name: str
    adapter: str | None = None
    draft_cap: int = 0


def variants_of(weights: AdapterWeights, adapter: str, max_draft: int = MAX_STREAMS) -> tuple[Variant, ...]:
    """Base, then the adapter with speculation off where that differs from the base, then with it on.

    `adapter` is the name it has in the engine; `max_draft`: the longest draft of the last one.
    """
    found = [Variant(BASE)]
    if weights.lora:
        found.append(Variant("lora", adapter))
    if weights.streams is not None:
        shared = "turbo_lora" if weights.lora else "turbo"
        fast = shared if weights.streams.head is None else "medusa"
        found.append(Variant(fast, adapter, max_draft))
    return tuple(found)
