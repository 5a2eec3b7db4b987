"""From final hidden states to tokens: the LM head and the sampler together, by the shortest way."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from slipstream.engine.head import Head
from slipstream.engine.plan import Pick
from slipstream.engine.sampling import RowRequest, Sampler


class Picker:
    """Picks a token of each row."""

    def __init__(self, head: Head, sampler: Sampler, rescore: bool) -> None:
        """`rescore`: the head's dtype makes ties, so close calls are scored again in float32."""
        self.head = head
        self.sampler = sampler
        self._rescore = rescore

    def pick(
        self, asked: Sequence[RowRequest], hidden: torch.Tensor, slots: Sequence[int]
    ) -> tuple[list[Pick], torch.Tensor | None]:
        """A token for each row of hidden [m, H], and all logits [m, V], if it took them."""
        best = self.best(asked, hidden, slots)
        return (best, None) if best is not None else self._pick_from_all(asked, hidden, slots)

    def best(self, asked: Sequence[RowRequest], hidden: torch.Tensor, slots: Sequence[int]) -> list[Pick] | None:
        """The best token of each row, where nothing else is asked of any and it does not take all logits. A row that needs
        them gets them alone: its company is none the wiser."""
        best = self.head.best(hidden, slots) if all(row.is_greedy for row in asked) else None
        if best is None:
            return None
        left = [row for row, pick in enumerate(best) if pick is None]
        if left:
            picked, _ = self._pick_from_all([asked[row] for row in left], hidden[left], [slots[row] for row in left])
            for row, pick in zip(left, picked, strict=True):
                best[row] = pick
        return [pick for pick in best if pick is not None]

    def among(self, among: Sequence[array[int]], states: torch.Tensor) -> list[Pick]:
        """The best of the ids that each row of states [m, H] has: see `Head.scores_among`."""
        best = self.sampler.columns.best(self.head.scores_among(states, among))
        found = zip(among, best.ids.tolist(), best.gaps.tolist(), strict=True)
        # A row that is not numbers has its best anywhere.
        return [Pick(ids[min(column, len(ids) - 1)], margin) for ids, column, margin in found]

    def _pick_from_all(
        self, asked: Sequence[RowRequest], hidden: torch.Tensor, slots: Sequence[int]
    ) -> tuple[list[Pick], torch.Tensor]:
        logits = self.head(hidden, slots)

        def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
            return self.head.exact(hidden[row], slots[row], ids)

        return self.sampler.pick(logits, asked, exact if self._rescore else None), logits
