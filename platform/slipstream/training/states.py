"""Final hidden states of a trunk that does not move, kept from the first epoch on.

Streams on a frozen model see the same states in every epoch, and the trunk is nearly all of a step's cost. So the first
time that a row is needed, the trunk reads it together with the rows of its first step; afterwards only the streams and
the LM head run. Which rows are read together depends on the plan alone, so a resumed run gets the same states, bit for bit,
as long as there is room for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class StateCache:
    """Rows by number → their states [trained positions, H], on the CPU.

    read: the states of some rows, by a forward pass. companions: the rows to read along with a row, itself among them; None:
    only what is missing is read. capacity: bytes; rows beyond it are read again whenever they are needed.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], list[torch.Tensor]],
        companions: Callable[[int], Sequence[int]] | None,
        capacity: int,
    ) -> None:
        self._read, self._companions = read, companions
        self._room = capacity
        self._full = False
        self._kept: dict[int, torch.Tensor] = {}

    def states(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """The states of `numbers`, in their order."""
        found = {number: self._kept[number] for number in numbers if number in self._kept}
        while missing := [number for number in numbers if number not in found]:
            group = missing if self._companions is None or self._full else self._companions(missing[0])
            fresh = dict(zip(group, self._read(group), strict=True))
            found |= fresh
            self._keep(fresh)
        return [found[number] for number in numbers]

    def _keep(self, fresh: dict[int, torch.Tensor]) -> None:
        for number, states in fresh.items():
            if number in self._kept:
                continue
            self._full = self._full or states.nbytes > self._room
            if not self._full:
                self._kept[number] = states
                self._room -= states.nbytes
