"""The collectives of one tensor-parallel group, and what they cost.

All ranks run the same steps on the same plan, so they call the same collectives in the same order; there is nothing to
negotiate and nobody to wait for but the slowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed

COLLECTIVE_TIMEOUT_S = 60.0  # beyond, a rank is taken for dead; a rank that died is noticed at once


@dataclass(slots=True)
class Traffic:
    """What one rank has put into collectives since its start."""

    calls: int = 0
    bytes: int = 0  # of the tensors it contributed, whatever way they took

    def add(self, tensor: torch.Tensor) -> None:
        """Count one tensor."""
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()


class Group(Protocol):
    """Some ranks that compute together."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What went through so far."""
        ...

    def all_reduce_(self, x: torch.Tensor) -> None:
        """The sum over ranks, in place; the same bits on each."""
        ...

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's x, by rank; all have one shape."""
        ...


class Alone:
    """A group of one: nothing is sent."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.traffic = Traffic()

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Leave x as it is."""

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x alone."""
        return [x]


class TorchGroup:
    """Over torch.distributed: NCCL between GPUs, gloo between processors."""

    def __init__(self, backend: Any, rank: int, size: int) -> None:
        self._backend = backend
        self._rank, self._size = rank, size
        self.traffic = Traffic()

    @staticmethod
    def join(store: Any, device: torch.device, rank: int, size: int, host: str) -> TorchGroup:
        """Wait until all ranks are there. `host`: an address of this rank's own machine, where gloo listens.

        Raises `RuntimeError` when somebody does not come.
        """
        limit = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            nccl: Any = distributed.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            return TorchGroup(distributed.ProcessGroupNCCL(store, rank, size, nccl), rank, size)
        # A group of its own rather than the process's default one: gloo then listens on the address that it is told.
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = limit
        options._devices = [gloo.create_device(hostname=host)]
        return TorchGroup(gloo(store, rank, size, options), rank, size)

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def all_reduce_(self, x: torch.Tensor) -> None:
        """The sum over ranks, in place; the same bits on each. Raises `RuntimeError` when a rank is gone."""
        self.traffic.add(x)
        self._backend.allreduce([x]).wait()

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's x, by rank. Raises `RuntimeError` when a rank is gone."""
        x = x.contiguous()
        self.traffic.add(x)
        found = [torch.empty_like(x) for _ in range(self._size)]
        self._backend.allgather([found], [x]).wait()
        return found


def all_well(group: Group, well: bool, device: torch.device) -> bool:
    """Whether every rank says so."""
    if group.size == 1:
        return well
    trouble = torch.tensor([0.0 if well else 1.0], device=device)
    group.all_reduce_(trouble)
    return float(trouble) == 0.0


def cat_shards(group: Group, x: torch.Tensor, sizes: Sequence[int], fill: float) -> torch.Tensor:
    """Shards x [n, sizes[rank]] of some columns → all of them [n, sum(sizes)]. What is sent is padded to the widest."""
    widest = max(sizes)
    padded = x if x.shape[1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[1]), value=fill)
    return torch.cat([part[:, :size] for part, size in zip(group.all_gather(padded), sizes, strict=True)], dim=1)
