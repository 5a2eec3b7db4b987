"""A sampler whose tokens are all that a test wants to know."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slipstream.engine.sampling import ExactLogits, RowRequest, Sampler


class IdSampler(Sampler):
    """`Sampler`, with the ids alone."""

    def ids(self, logits: torch.Tensor, rows: Sequence[RowRequest], exact: ExactLogits | None) -> list[int]:
        """See `Sampler.pick`."""
        return [pick.token for pick in self.pick(logits, rows, exact)]
