"""What streams say comes next: from the last accepted row of each sequence for which some are to run.

Whatever the request's temperature, a guess is the most likely token, penalties and bias included (docs/decisions/0001).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from slipstream.engine.batch import StepBatch, row_request
from slipstream.engine.picking import Picker
from slipstream.engine.plan import Pick, PlannedSequence
from slipstream.engine.sampling import RowRequest
from slipstream.engine.streams import StreamBank

Guesses = dict[int, tuple[Pick, ...]]  # by seq_id


@dataclass(frozen=True, slots=True)
class _Chain:
    """One sequence's guesses. emitted: what it has just said; states: its rows of the streams' states; asked: how they are
    picked, if none depends on the ones before it."""

    part: PlannedSequence
    emitted: tuple[int, ...]
    states: range
    asked: tuple[RowRequest, ...]

    @property
    def can_be_cut(self) -> bool:
        """Whether a draft vocabulary's scores are all that its guesses need."""
        return self.part.draft_among is not None and all(row.is_plain for row in self.asked)

    @property
    def first(self) -> int:
        """The position, in its answer, of the first guess."""
        return self.part.output_index + len(self.emitted)


class Guesser:
    """Runs streams and picks their tokens."""

    def __init__(self, streams: StreamBank, picker: Picker, embedding: nn.Module) -> None:
        self._streams = streams
        self._picker = picker
        self._embedding = embedding

    def guess(
        self, batch: StepBatch, sampled: torch.Tensor, decided: Sequence[Sequence[int]], broken: Sequence[bool]
    ) -> Guesses:
        """sampled: [m, H] of the batch's sample rows; decided: what each of its spans emits. Rows that are `broken` have
        nothing to say."""
        last, chains, end = list[int](), list[_Chain](), 0
        for (part, first), tokens in zip(batch.spans, decided, strict=True):
            row = first + len(tokens) - 1
            if part.draft_next > 0 and not broken[row]:
                last.append(row)
                chains.append(_chain(self.colder(part), tuple(tokens), range(end, end + part.draft_next)))
                end += part.draft_next
        if not chains:
            return {}
        counts, slots = [chain.part.draft_next for chain in chains], [chain.part.slot for chain in chains]
        said = torch.tensor([chain.emitted[-1] for chain in chains], device=sampled.device)
        states = self._streams.hidden(sampled[last], self._embedding(said), slots, counts)
        own = self._streams.own_heads(slots, counts)
        if own:
            return self._from_all(chains, self._picker.head.drafts(states, _slots(chains), own))
        cut = self._cut(chains)
        found = self._among(cut, states) if cut else {}
        left = [chain for chain in chains if chain.part.seq_id not in found]
        return found | self._whole(left, states) if left else found

    def colder(self, part: PlannedSequence) -> PlannedSequence:
        """The sequence with the parameters by which its guesses are picked. (`benchmarks drafts` overrides it.)"""
        params = part.params
        if params.temperature == 0.0 and params.logprobs is None:
            return part
        return replace(part, params=replace(params, temperature=0.0, logprobs=None))

    def _cut(self, chains: Sequence[_Chain]) -> list[_Chain]:
        """Those that pick from a draft vocabulary. None, if these together are no less than the whole one."""
        head = self._picker.head
        if not head.scores_some:
            return []
        found = [chain for chain in chains if chain.can_be_cut and not head.is_changed(chain.part.slot)]
        distinct = {id(ids): len(ids) for chain in found if (ids := chain.part.draft_among) is not None}
        return found if sum(distinct.values()) < self._picker.sampler.vocab_size else []

    def _among(self, chains: Sequence[_Chain], states: torch.Tensor) -> Guesses:
        """From draft vocabularies."""
        among = [ids for chain in chains for _ in chain.states if (ids := chain.part.draft_among) is not None]
        return _by_sequence(chains, self._picker.among(among, _rows(states, chains)))

    def _whole(self, chains: Sequence[_Chain], states: torch.Tensor) -> Guesses:
        """From all of the vocabulary."""
        states, slots = _rows(states, chains), _slots(chains)
        best = self._picker.best([row for chain in chains for row in chain.asked], states, slots)
        return (
            _by_sequence(chains, best) if best is not None else self._from_all(chains, self._picker.head(states, slots))
        )

    def _from_all(self, chains: Sequence[_Chain], logits: torch.Tensor) -> Guesses:
        """From these chains' logits."""
        sampler, found, end = self._picker.sampler, Guesses(), 0
        apart: list[_Chain] = []  # whose guesses do not depend on each other: all in one go
        rows: list[int] = []
        for chain in chains:
            own = range(end, end + len(chain.states))
            end = own.stop
            if chain.part.params.has_penalties:
                found[chain.part.seq_id] = self._one_by_one(chain, logits[own.start : own.stop])
            else:
                apart.append(chain)
                rows += own
        if apart:
            asked = [row for chain in apart for row in chain.asked]
            found |= _by_sequence(
                apart, sampler.pick(logits if len(rows) == len(logits) else logits[rows], asked, None)
            )
        return found

    def _one_by_one(self, chain: _Chain, logits: torch.Tensor) -> tuple[Pick, ...]:
        """Each guess sees the ones before it in its history, as its verification will."""
        picks: tuple[Pick, ...] = ()
        for k in range(logits.shape[0]):
            history = chain.emitted + tuple(pick.token for pick in picks)
            request = row_request(chain.part, chain.first + k, history)
            picks += tuple(self._picker.sampler.pick(logits[k : k + 1], [request], None))
        return picks


def _chain(part: PlannedSequence, emitted: tuple[int, ...], states: range) -> _Chain:
    first = part.output_index + len(emitted)
    return _Chain(part, emitted, states, tuple(row_request(part, first + k, ()) for k in range(len(states))))


def _slots(chains: Sequence[_Chain]) -> list[int]:
    """Of each stream state."""
    return [chain.part.slot for chain in chains for _ in chain.states]


def _rows(states: torch.Tensor, chains: Sequence[_Chain]) -> torch.Tensor:
    """These chains' stream states; all of them are not copied."""
    rows = [row for chain in chains for row in chain.states]
    return states if len(rows) == states.shape[0] else states[rows]


def _by_sequence(chains: Sequence[_Chain], picks: Sequence[Pick]) -> Guesses:
    rest = iter(picks)
    return {chain.part.seq_id: tuple(next(rest) for _ in chain.states) for chain in chains}
