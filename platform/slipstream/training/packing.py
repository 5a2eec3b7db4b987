"""From rows to tensors: which rows each optimiser step sees, and how they share a tensor without seeing each other.

A step is `batch_size` rows, whatever their lengths, so that packing never changes what a step learns from. A step's rows
are packed, first fit in decreasing length; position ids start anew with each row, which is what transformers makes its
block-diagonal attention mask from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from slipstream.training.data import IGNORE, Encoded

NO_SEGMENT = -1


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward pass. All int64 [packs, length]: `labels` as in `Encoded`; `position_ids` count from 0 in each row;
    `segments` number the rows, NO_SEGMENT on padding."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor

    def as_dict(self) -> dict[str, torch.Tensor]:
        """What a Trainer moves to the device and hands to `forward`."""
        return {name: getattr(self, name) for name in self.__slots__}


def pack(rows: Sequence[Encoded], pack_length: int, pad_id: int) -> PackedBatch:
    """Pack rows into tensors of at most max(pack_length, longest row) columns."""
    bins = first_fit(rows, max(pack_length, *(len(row.ids) for row in rows)))
    width = max(sum(len(rows[i].ids) for i in members) for members in bins)
    shape = (len(bins), width)
    batch = PackedBatch(
        input_ids=torch.full(shape, pad_id),
        labels=torch.full(shape, IGNORE),
        position_ids=torch.zeros(shape, dtype=torch.long),
        segments=torch.full(shape, NO_SEGMENT),
    )
    for line, members in enumerate(bins):
        start = 0
        for i in members:
            end = start + len(rows[i].ids)
            batch.input_ids[line, start:end] = torch.tensor(rows[i].ids)
            batch.labels[line, start:end] = torch.tensor(rows[i].labels)
            batch.position_ids[line, start:end] = torch.arange(end - start)
            batch.segments[line, start:end] = i
            start = end
        batch.position_ids[line, start:] = torch.arange(width - start)  # one more segment of its own
    return batch


def first_fit(rows: Sequence[Encoded], capacity: int) -> list[list[int]]:
    """Row numbers of each pack: first fit in decreasing length (at most 11/9 of the fewest packs possible)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        size = len(rows[i].ids)
        place = next((b for b, left in enumerate(room) if left >= size), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(i)
        room[place] -= size
    return bins


class MicroBatches(Dataset[list[int]]):
    """The whole run in order: item i is the numbers of the rows that forward pass i sees. A function of the seed alone, so a
    resumed run goes on where it was, and several workers share out what one would do.

    Every `per_step` items make one optimiser step of `batch_size` rows, the last of an epoch perhaps of fewer.
    """

    def __init__(self, rows: int, *, epochs: int, batch_size: int, per_step: int, seed: int) -> None:
        self._items = list(_plan(rows, epochs, batch_size, per_step, seed))
        self._first: dict[int, list[int]] = {}
        for item in self._items:
            for number in item:
                self._first.setdefault(number, item)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> list[int]:
        return self._items[index]

    def companions(self, number: int) -> list[int]:
        """The item that a row is in first."""
        return self._first[number]


def _plan(rows: int, epochs: int, batch_size: int, per_step: int, seed: int) -> Iterator[list[int]]:
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        for start in range(0, rows, batch_size):
            step = order[start : start + batch_size]
            if len(step) < per_step:  # too few rows to go round: the next epoch begins
                break
            yield from (step[i::per_step] for i in range(per_step))
