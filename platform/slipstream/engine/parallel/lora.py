"""How adapters lie on the ranks of a tensor-parallel group.

By default B follows the base's rows and A its columns (`Shards.adapter`): no collective is added, but every rank has all of A
of a column-wise linear, and all of B of a row-wise one. Fully sharded (S-LoRA, arXiv 2311.03285, section 6) no rank has
more than its share of either, and rows meet between shrink and expand: one small collective more for every group of linears.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from slipstream.engine.parallel.group import Alone, Group
from slipstream.engine.parallel.shards import WHOLE, Shards, is_by_vocab, spans


@dataclass(frozen=True, slots=True)
class LoraSplit:
    """The fully sharded scheme for one group of linears; over a group of one: adapters are not cut any further.

    by_inputs: the linears are row-wise. Ranks add up what they shrank from their inputs, and each expands outputs of its own,
    which the base's sum brings together. Else each rank shrinks to columns of its own, and all get all of them.
    """

    group: Group
    by_inputs: bool = False

    @staticmethod
    def of(shards: Shards, name: str) -> LoraSplit:
        """For a linear and its siblings. The LM head is left out: the rank that has a candidate scores it again by itself."""
        cut = shards.cut(name)
        return NOT_SPLIT if cut is WHOLE or is_by_vocab(name) else LoraSplit(shards.group, cut.reduces)

    @property
    def shares(self) -> int:
        """In how many parts the columns of A are, each on a rank."""
        return 1 if self.by_inputs else self.group.size

    def width(self, rank: int) -> int:
        """Columns of A on each rank, for adapters of rank `rank`. Where it does not divide, some are zeros."""
        return -(-rank // self.shares)

    def outputs(self, size: int) -> slice:
        """The columns of B [r, size] that are here."""
        own = spans(size, self.group.size)[self.group.rank] if self.by_inputs else range(size)
        return slice(own.start, own.stop)

    def cut(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A [in, r], B [r, out] → this rank's [in, width], [shares * width, its outputs]."""
        if self.group.size == 1:
            return a, b
        rank = a.shape[1]
        more = self.shares * self.width(rank) - rank
        own = F.pad(a, (0, more)).chunk(self.shares, dim=1)[0 if self.by_inputs else self.group.rank]
        return own.contiguous(), F.pad(b[:, self.outputs(b.shape[1])], (0, 0, 0, more)).contiguous()

    def meet(self, shrunk: torch.Tensor, siblings: int = 1) -> torch.Tensor:
        """Rows shrunk here [..., siblings * width] → rows shrunk by all ranks [..., siblings * shares * width]."""
        if self.group.size == 1:
            return shrunk
        if self.by_inputs:
            self.group.all_reduce_(shrunk)
            return shrunk
        width = shrunk.shape[-1] // siblings
        parts = [part.view(*part.shape[:-1], siblings, width) for part in self.group.all_gather(shrunk)]
        return torch.cat(parts, dim=-1).flatten(-2)


NOT_SPLIT = LoraSplit(Alone())
