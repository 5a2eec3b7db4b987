"""Figures with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Series:
    """One figure over the rounds of a run."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.0f} ({min(self.values):.0f}–{max(self.values):.0f})"


def ratio(ours: Series, theirs: Series) -> str:
    """Median of the round-by-round ratios, with the extremes: both sides saw the same machine in the same minute."""
    pairs = [a / b for a, b in zip(ours.values, theirs.values, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f}–{max(pairs):.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
