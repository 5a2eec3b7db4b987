"""What an evaluation found. Plain data; no torch."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """A ratio over the rounds of a run."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class VariantResult:
    """One variant's figures over all rows."""

    rows: int
    exact_match: float  # share of rows whose text is the reference, white space at both ends aside
    rouge_l: float  # mean F-measure, 0 … 1
    tokens_per_step: float  # answer tokens for each engine step that emitted
    acceptance: tuple[float, ...]  # by draft position: P(right | all drafts before it right); empty without drafts
    tokens_per_second: float  # answer tokens over the time of this variant's runs, prefill included
    completion_tokens: int  # end tokens included
    mean_completion_tokens: float
    speedup: Mapping[str, Spread] = field(default_factory=dict)  # tokens/s over an earlier variant's, round by round


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All variants, in the order they were asked for."""

    variants: Mapping[str, VariantResult]
    texts: Mapping[str, tuple[str, ...]]  # each variant's answers, row by row

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Variant → its figures, ready for `json.dumps`; without the texts."""
        return {name: dataclasses.asdict(result) for name, result in self.variants.items()}
