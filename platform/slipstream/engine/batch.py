"""From the sequences of a `StepPlan` to the tensors of one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from slipstream.engine.attention import AttentionLayout, KVCache, PagedBatch, Segment, Segments
from slipstream.engine.plan import PlannedSequence
from slipstream.engine.sampling import RowRequest

WIDTH_UNIT = 256  # contexts below this many tokens share a group; above, those within a factor of two
DECODE_ROWS = 16  # sequences with at most this many rows are attended in one padded group


LayOut = Callable[[Sequence[PlannedSequence], Sequence[int], int, torch.device], AttentionLayout]
"""(sequences, first row of each, block size, device) → their attention."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Flat tensors of one step. input_ids, positions: int64 [n]; sample_rows: int64 [m] rows whose logits count."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: tuple[int, ...]  # adapter slot of each token, -1 = base
    paged: PagedBatch
    sample_rows: torch.Tensor
    sample_slots: tuple[int, ...]
    requests: tuple[RowRequest, ...]  # one for each sample row
    spans: tuple[tuple[PlannedSequence, int], ...]  # sampling sequences and their first index in sample_rows


def segments(
    parts: Sequence[PlannedSequence], first_row: Sequence[int], block_size: int, device: torch.device
) -> AttentionLayout:
    """Attention by gathered segments."""
    groups = _groups(parts, first_row)
    return Segments(tuple(_segment(group, block_size, device, len(groups) == 1) for group in groups))


def build_batch(
    parts: Sequence[PlannedSequence], cache: KVCache, device: torch.device, lay_out: LayOut = segments
) -> StepBatch:
    """Lay a plan's sequences out, in the order given."""
    ids: list[int] = []
    positions: list[int] = []
    adapter: list[int] = []
    kv_slots: list[int] = []
    first_row: list[int] = []
    size = cache.block_size
    for part in parts:
        first_row.append(len(ids))
        ids += part.tokens
        span = range(part.start, part.start + len(part.tokens))
        positions += span
        adapter += [part.slot] * len(part.tokens)
        kv_slots += [part.blocks[p // size] * size + p % size for p in span]
    sample_rows, sample_slots, requests, spans = _samples(parts, first_row)

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    paged = PagedBatch(cache, tensor(kv_slots), lay_out(parts, first_row, size, device))
    return StepBatch(
        tensor(ids), tensor(positions), tuple(adapter), paged, tensor(sample_rows), tuple(sample_slots),
        tuple(requests), tuple(spans),
    )  # fmt: skip


def _samples(
    parts: Sequence[PlannedSequence], first_row: list[int]
) -> tuple[list[int], list[int], list[RowRequest], list[tuple[PlannedSequence, int]]]:
    rows: list[int] = []
    slots: list[int] = []
    requests: list[RowRequest] = []
    spans: list[tuple[PlannedSequence, int]] = []
    for part, first in zip(parts, first_row, strict=True):
        if not part.samples:
            continue
        spans.append((part, len(rows)))
        last = first + len(part.tokens) - 1
        for j in range(part.num_drafts + 1):
            rows.append(last - part.num_drafts + j)
            slots.append(part.slot)
            requests.append(row_request(part, part.output_index + j, drafts_before(part, j)))
    return rows, slots, requests, spans


def drafts_before(part: PlannedSequence, j: int) -> tuple[int, ...]:
    """The drafts that row j of a verification has seen."""
    return part.tokens[len(part.tokens) - part.num_drafts :][:j]


def row_request(part: PlannedSequence, position: int, after_history: tuple[int, ...]) -> RowRequest:
    """How to sample the row that decides answer token `position`, given the tokens since the plan's history."""
    history = part.history + after_history if part.params.has_penalties else ()
    return RowRequest(part.params, position, history, part.prompt_len)


@dataclass(frozen=True, slots=True)
class _Member:
    part: PlannedSequence
    first_row: int


def _groups(parts: Sequence[PlannedSequence], first_row: Sequence[int]) -> list[list[_Member]]:
    """Short sequences of similar context together; each longer prefill chunk alone. All members of a group are padded to the
    longest, in rows and in keys: one 8,000-token context must not make 31 short ones read 8,000 keys each."""
    short: dict[int, list[_Member]] = {}
    groups: list[list[_Member]] = []
    for part, first in zip(parts, first_row, strict=True):
        if len(part.tokens) <= DECODE_ROWS:
            width = (part.start + len(part.tokens)) // WIDTH_UNIT
            short.setdefault(width.bit_length(), []).append(_Member(part, first))
        else:
            groups.append([_Member(part, first)])
    return [*short.values(), *groups]


def _segment(group: list[_Member], block_size: int, device: torch.device, whole: bool) -> Segment:
    """`whole`: there is no other segment in the step."""
    num_queries = max(len(m.part.tokens) for m in group)
    length = max(m.part.start + len(m.part.tokens) for m in group)
    width = -(-length // block_size)
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    tables: list[int] = []
    out_rows: list[int] = []
    out_places: list[int] = []
    for b, m in enumerate(group):
        count = len(m.part.tokens)
        pad = num_queries - count
        rows.append([*range(m.first_row, m.first_row + count), *[m.first_row + count - 1] * pad])
        end = m.part.start + count
        positions.append([*range(m.part.start, end), *[end - 1] * pad])
        tables += [*m.part.blocks[:width], *[m.part.blocks[0]] * (width - len(m.part.blocks))]
        out_rows += range(m.first_row, m.first_row + count)
        out_places += range(b * num_queries, b * num_queries + count)

    def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    side_by_side = len(group) == 1 and tables == list(range(tables[0], tables[0] + width))
    keys = tables[0] if side_by_side else tensor(tables)
    seen = min(own[0] for own in positions)
    flat = [row for own in rows for row in own]
    if whole and flat == out_rows == list(range(len(flat))):
        return Segment(None, tensor(positions), keys, width * block_size, seen, None, None)
    return Segment(
        tensor(flat), tensor(positions), keys, width * block_size, seen, tensor(out_rows), tensor(out_places)
    )


def verified(batch: StepBatch, picked: Sequence[int]) -> list[list[int]]:
    """Sample-and-match (methods.md 2.3): of each sequence's rows, tokens up to the first that is not its draft."""
    decided = []
    for part, first in batch.spans:
        drafts = part.tokens[len(part.tokens) - part.num_drafts :]
        count = 1
        for j, draft in enumerate(drafts):
            if picked[first + j] != draft:
                break
            count = j + 2
        decided.append(list(picked[first : first + count]))
    return decided
