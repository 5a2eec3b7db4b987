"""How many drafts each sequence gets: as many as make the next step give the most tokens a second (methods.md 3.4).

A draft is worth the chance that it and all before it are right; it costs a row of the forward, a row of the LM head to be
drafted and another to be verified. While the machine waits for memory rows are all but free and every draft pays; when it
computes, only likely ones do, and speculation ends by itself. After SmartSpec (arXiv 2406.14066). Pure Python, no clock: the
runner measures what rows cost once, at start-up, and only the shape of that curve matters here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Protocol

PRIOR = 0.6  # acceptance of a draft position that was never judged …
PRIOR_WEIGHT = 8.0  # … counted as this many judgements
MEMORY = 0.99  # what a judgement still counts for, one judgement of the same position later
LEAST_GAIN = 0.05  # what drafts must promise over none: the costs are not known better than that
ALIKE = 0.85  # adapters whose full drafts give this share of the best's tokens a step are treated like it
COST_GROUP = 4  # rows of a sequence with three drafts, as costs are measured
PROBE_EVERY = 32  # steps after which an adapter that gets no drafts is tried again with one
ADAPTERS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class DraftWish:
    """A sequence that could have drafts verified in the next step."""

    adapter: str  # digest
    most: int  # its streams, its request's cap and what is left of its answer


class DraftPolicy(Protocol):
    """Decides draft lengths; owned by the scheduler."""

    def lengths(self, wishes: Sequence[DraftWish], rows: int) -> list[int]:
        """Drafts for each wish. `rows` are the token rows of the next step without any draft."""
        ...

    def observe(self, adapter: str, judged: int, accepted: int) -> None:
        """Of a step's drafts, `judged` leading ones were compared with a token and `accepted` of them were right."""
        ...


class FullDrafts:
    """Every sequence gets all drafts it may have, whatever they are worth."""

    def lengths(self, wishes: Sequence[DraftWish], rows: int) -> list[int]:
        """The most of each."""
        return [wish.most for wish in wishes]

    def observe(self, adapter: str, judged: int, accepted: int) -> None:
        """Nothing is learnt."""


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Measured seconds of one call with so many rows: of the decoder, and of the LM head with picking a token of each.
    Between measured points costs are linear, above them they go on like the last two.

    A row that is a sequence of its own brings an adapter and a context along, a draft's row does not: `decoder_s` is for
    sequences of `COST_GROUP` rows each, `alone_s` (None: the same) for sequences of one.
    """

    rows: tuple[int, ...]
    decoder_s: tuple[float, ...]
    head_s: tuple[float, ...]
    alone_s: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Costs never fall with more rows: where a measurement says so it was disturbed."""
        assert len(self.rows) >= 2
        assert len(self.rows) == len(self.decoder_s) == len(self.head_s)
        object.__setattr__(self, "decoder_s", _rising(self.decoder_s))
        object.__setattr__(self, "alone_s", _rising(self.alone_s) if self.alone_s is not None else self.decoder_s)
        object.__setattr__(self, "head_s", _rising(self.head_s))

    def step_s(self, rows: int, drafts: int, sequences: int) -> float:
        """Seconds of a step of `rows` token rows and `drafts` more that samples for `sequences`, next drafts included."""
        return (
            self._decoder(rows, rows + drafts)
            + self._at(self.head_s, sequences + drafts)
            + (self._at(self.head_s, drafts) if drafts else 0.0)
        )

    def _decoder(self, sequences: int, rows: int) -> float:
        """Between the two ways that rows were measured, by how many belong to a sequence."""
        assert self.alone_s is not None
        together = self._at(self.decoder_s, rows)
        alone = (sequences / rows - 1 / COST_GROUP) / (1 - 1 / COST_GROUP)
        return together + max(alone, 0.0) * (self._at(self.alone_s, rows) - together)

    def _at(self, costs: tuple[float, ...], rows: int) -> float:
        i = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        share = (rows - self.rows[i - 1]) / (self.rows[i] - self.rows[i - 1])
        return costs[i - 1] + max(share, 0.0) * (costs[i] - costs[i - 1])


def _rising(costs: tuple[float, ...]) -> tuple[float, ...]:
    """The largest rising curve that is nowhere above a measurement: disturbance only ever adds."""
    return tuple(accumulate(reversed(costs), min))[::-1]


@dataclass(frozen=True, slots=True)
class _Offer:
    """One more draft for each of some wishes, each right with the same chance."""

    survival: float
    wishers: list[int]


@dataclass(slots=True)
class _Acceptance:
    """Of one adapter, by draft position: decayed counts."""

    judged: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    idle_steps: int = 0  # since it last had a draft

    def chance(self, position: int) -> float:
        """P(draft is right | all before it are)."""
        if position >= len(self.judged):
            return PRIOR
        return (self.accepted[position] + PRIOR * PRIOR_WEIGHT) / (self.judged[position] + PRIOR_WEIGHT)

    def observe(self, judged: int, accepted: int) -> None:
        more = judged - len(self.judged)
        self.judged += [0.0] * more
        self.accepted += [0.0] * more
        for j in range(judged):
            self.judged[j] = MEMORY * self.judged[j] + 1.0
            self.accepted[j] = MEMORY * self.accepted[j] + (j < accepted)


class GoodputDrafts:
    """The draft lengths with the best expected tokens a second, from each adapter's measured acceptance."""

    def __init__(self, costs: RowCosts) -> None:
        self._costs = costs
        self._adapters: OrderedDict[str, _Acceptance] = OrderedDict()

    def acceptance(self, adapter: str, positions: int) -> tuple[float, ...]:
        """What is believed of an adapter's drafts now."""
        known = self._known(adapter)
        return tuple(known.chance(j) for j in range(positions))

    def observe(self, adapter: str, judged: int, accepted: int) -> None:
        """Learn. Drafts after the first wrong one say nothing."""
        self._known(adapter).observe(judged, accepted)

    def lengths(self, wishes: Sequence[DraftWish], rows: int) -> list[int]:
        """Each wish's drafts: of all offers those with the highest survival, as many as give the best goodput."""
        offers: list[_Offer] = []
        for wishers, chances in self.classes(wishes):
            survivals = accumulate(chances, mul)  # falls along a chain, so the best offers are prefixes of chains
            for position, survival in enumerate(survivals):
                offers.append(_Offer(survival, [i for i in wishers if wishes[i].most > position]))
        offers.sort(key=lambda offer: -offer.survival)
        lengths = [0] * len(wishes)
        for offer in offers[: self._best_count(offers, rows, len(wishes))]:
            for i in offer.wishers:
                lengths[i] += 1
        self._probe(wishes, lengths)
        return lengths

    def classes(self, wishes: Sequence[DraftWish]) -> list[tuple[list[int], list[float]]]:
        """Wishes (by index) whose adapters are about as good, and what is believed of their drafts together.

        They get drafts alike: estimates that differ by less than their error must not decide that one request drafts and its
        neighbour never does, while it waits for the neighbour's rows. Equal lengths are also cheaper: nothing is padded.
        """
        most = max((wish.most for wish in wishes), default=0)
        wishers: dict[str, list[int]] = {}
        for i, wish in enumerate(wishes):
            wishers.setdefault(wish.adapter, []).append(i)
        chances = {adapter: self.acceptance(adapter, most) for adapter in wishers}
        worth = {adapter: sum(accumulate(own, mul)) for adapter, own in chances.items()}
        classes: list[list[str]] = []
        for adapter in sorted(wishers, key=lambda adapter: -worth[adapter]):
            if not classes or 1.0 + worth[adapter] < ALIKE * (1.0 + worth[classes[-1][0]]):
                classes.append([])
            classes[-1].append(adapter)
        found = []
        for alike in classes:
            members = [i for adapter in alike for i in wishers[adapter]]
            weighted = ([len(wishers[adapter]) * chance for chance in chances[adapter]] for adapter in alike)
            found.append((members, [sum(position) / len(members) for position in zip(*weighted, strict=True)]))
        return found

    def _best_count(self, offers: Sequence[_Offer], rows: int, sequences: int) -> int:
        best, count = sequences / self._costs.step_s(rows, 0, sequences) * (1 + LEAST_GAIN), 0
        gained, drafts = 0.0, 0
        for i, offer in enumerate(offers):
            gained += offer.survival * len(offer.wishers)
            drafts += len(offer.wishers)
            goodput = (sequences + gained) / self._costs.step_s(rows, drafts, sequences)
            if goodput > best:
                best, count = goodput, i + 1
        return count

    def _probe(self, wishes: Sequence[DraftWish], lengths: list[int]) -> None:
        """What was learnt of an adapter long ago may have changed with its prompts: try one draft now and then."""
        adapters: dict[str, tuple[int, int]] = {}  # → longest draft, and whose
        for i, wish in enumerate(wishes):
            if wish.most:
                adapters[wish.adapter] = max(adapters.get(wish.adapter, (0, i)), (lengths[i], i))
        for adapter, (longest, i) in adapters.items():
            known = self._known(adapter)
            known.idle_steps = 0 if longest else known.idle_steps + 1
            if known.idle_steps >= PROBE_EVERY:
                known.idle_steps = 0
                lengths[i] = 1

    def _known(self, adapter: str) -> _Acceptance:
        known = self._adapters.get(adapter)
        if known is None:
            known = self._adapters[adapter] = _Acceptance()
        self._adapters.move_to_end(adapter)
        if len(self._adapters) > ADAPTERS_KEPT:
            self._adapters.popitem(last=False)
        return known
