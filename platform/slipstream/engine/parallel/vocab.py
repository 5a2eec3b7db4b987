"""Logits whose columns lie on several ranks: who is best is found out by exchanging a few numbers a row."""

from __future__ import annotations

from collections.abc import Callable

import torch

from slipstream.engine.parallel.group import cat_shards
from slipstream.engine.parallel.shards import Shards
from slipstream.engine.sampling import Best, Columns


class ShardedColumns(Columns):
    """Each rank has some columns [R, V_rank] of every row; all ranks ask for the same rows, and get the same answers."""

    def __init__(self, best: Callable[[torch.Tensor], Best], shards: Shards) -> None:
        super().__init__(best)
        self._shards = shards
        self._sizes = [len(part) for part in shards.vocab]

    def best(self, own: torch.Tensor) -> Best:
        """See `Columns.best`. 12 bytes a row and rank are sent; ids as float32, which is exact up to 2^24."""
        found = super().best(own)
        values, second = found.values.float(), (found.values - found.gaps).float()
        told = torch.stack([values, second, (found.ids + self._shards.own_vocab.start).float()])
        parts = torch.stack(self._shards.group.all_gather(told))  # [ranks, 3, R]
        winner = parts[:, 0].argmax(dim=0, keepdim=True)  # the first among equals: the lowest ids
        two = parts[:, :2].flatten(0, 1).topk(2, dim=0).values
        return Best(parts[:, 2].gather(0, winner)[0].long(), two[0], two[0] - two[1])

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """See `Columns.whole`."""
        return cat_shards(self._shards.group, own, self._sizes, float("-inf"))
