"""How many streams run for each sequence, and how many drafts are verified: as make steps give the most tokens a second
(methods.md 3.4).

A draft is worth the chance that it and all before it are right; it costs a row of the forward and of the LM head to be
verified, and one of the head, or of a draft vocabulary, to be made by a stream. While the machine waits for memory rows are
all but free and every draft pays; when it computes, only likely ones do, and speculation ends by itself. After SmartSpec
(arXiv 2406.14066), with chances of single drafts (`chains.py`) instead of averages. Pure Python, no clock: the runner
measures what rows cost once, at start-up, and only the shape of that curve matters here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Protocol

LEAST_GAIN = 0.05  # what drafts must promise over none if all draft: costs are not known better than that
LEVELS = 16  # chances are told apart so finely
COST_GROUP = 4  # rows of a sequence with three drafts, as costs are measured
PROBE_EVERY = 32  # steps after which one stream more is tried for an adapter of which not all run
PRIOR_WEIGHT = 8.0  # chains that an adapter's first ones are added to …
PRIOR_SURE = 0.5  # … of which so many are sure, and the others hopeless
MEMORY = 0.98  # what a chain still counts for, one of the same adapter's later
KEPT_SHARE = 0.1  # of the last step in `kept`
LEAST_SURVIVAL = 0.05  # drafts less likely pay nowhere
FLOOR_SHARE = 0.7  # of the chance at which a draft pays: what is below need not be looked at
DECIDE_SHARE = 4  # streams are decided on every step for so many sequences, every second for twice as many, and so on …
CHANGE = 0.25  # … and when the sequences have become more or fewer by this share


class StreamWorth:
    """What one adapter's streams add to a chain's chances, by position: how often how much, of late."""

    __slots__ = ("_masses", "_weights", "length", "untried_steps")

    def __init__(self) -> None:
        self._masses: list[list[float]] = []  # [positions][LEVELS]
        self._weights: list[float] = []  # of each position's next chain: they grow, so that masses need not shrink
        self.untried_steps = 0  # in which more streams could have run
        self.length: int | None = None  # streams to run, as decided last

    def observe(self, gains: Sequence[float], ran: int) -> None:
        """A chain for which `ran` streams had run; they added `gains`, and nothing after these."""
        self._reach(ran)
        for position in range(ran):
            masses, weight = self._masses[position], self._weights[position]
            masses[int(gains[position] * LEVELS) if position < len(gains) else 0] += weight
            self._weights[position] = weight / MEMORY
            if weight > 1e6:
                masses[:] = [mass / weight for mass in masses]
                self._weights[position] = 1.0 / MEMORY

    def gain(self, position: int, benefits: Sequence[float]) -> float:
        """Mean benefit of running the stream of this position, when a chance of each level is worth so much."""
        self._reach(position + 1)
        masses = self._masses[position]
        return float(sum(map(mul, masses, benefits)) / sum(masses))

    def _reach(self, positions: int) -> None:
        while len(self._masses) < positions:
            masses = [0.0] * LEVELS
            masses[int(0.95 ** (len(self._masses) + 1) * LEVELS)] += PRIOR_SURE * PRIOR_WEIGHT
            masses[0] += (1 - PRIOR_SURE) * PRIOR_WEIGHT
            self._masses.append(masses)
            self._weights.append(1.0)


@dataclass(frozen=True, slots=True)
class DraftWish:
    """A sequence for which streams could run."""

    worth: StreamWorth  # its adapter's
    most: int  # its streams, its request's cap and what is left of its answer
    cut: bool = False  # whether they pick from a draft vocabulary


class DraftPolicy(Protocol):
    """Decides draft lengths, when so many sequences are at work, those included whose prompts are still to be computed.

    It is not about the rows of one step: a token is worth the time that it would take later, among all the others.
    """

    kept: float  # drafts of a chain that were verified, of late

    def floor(self, sequences: int) -> float:
        """Drafts that are less likely need not be offered."""
        ...

    def streams(self, wishes: Sequence[DraftWish], sequences: int) -> list[int]:
        """Streams to run for each wish, for the next step."""
        ...

    def keep(self, survivals: Sequence[Sequence[float]], sequences: int) -> list[int]:
        """Drafts to verify of each chain in this step, given the chances that they survive."""
        ...


class FullDrafts:
    """Every sequence gets all drafts it may have, whatever they are worth."""

    kept = 1.0

    def floor(self, sequences: int) -> float:
        """None is too unlikely."""
        return 0.0

    def streams(self, wishes: Sequence[DraftWish], sequences: int) -> list[int]:
        """The most of each."""
        return [wish.most for wish in wishes]

    def keep(self, survivals: Sequence[Sequence[float]], sequences: int) -> list[int]:
        """All of them."""
        return [len(chain) for chain in survivals]


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Measured seconds of one call with so many rows: of the decoder, of the LM head with picking a token of each, and of
    streams with theirs. Between measured points costs are linear, above them they go on like the last two.

    A row that is a sequence of its own brings an adapter and a context along, a draft's row does not: `decoder_s` is for
    sequences of `COST_GROUP` rows each, `alone_s` (None: the same) for sequences of one. Streams are as dear as their head's
    rows where `guess_s` is None, and those that pick from a draft vocabulary as dear as others where `cut_s` is.
    """

    rows: tuple[int, ...]
    decoder_s: tuple[float, ...]
    head_s: tuple[float, ...]
    alone_s: tuple[float, ...] | None = None
    guess_s: tuple[float, ...] | None = None
    cut_s: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Costs never fall with more rows: where a measurement says so it was disturbed."""
        assert len(self.rows) >= 2
        assert len(self.rows) == len(self.decoder_s) == len(self.head_s)
        object.__setattr__(self, "decoder_s", _rising(self.decoder_s))
        object.__setattr__(self, "alone_s", _rising(self.alone_s) if self.alone_s is not None else self.decoder_s)
        object.__setattr__(self, "head_s", _rising(self.head_s))
        object.__setattr__(self, "guess_s", _rising(self.guess_s) if self.guess_s is not None else self.head_s)
        object.__setattr__(self, "cut_s", _rising(self.cut_s) if self.cut_s is not None else self.guess_s)

    def step_s(self, sequences: int, drafts: int) -> float:
        """Seconds of a step that decodes for so many sequences and verifies so many drafts, streams not included."""
        rows = sequences + drafts
        return self._decoder(sequences, rows) + self._at(self.head_s, rows)

    def streams_s(self, streams: int, cut: bool = False) -> float:
        """Seconds that so many streams take, of all sequences together; `cut`: with draft vocabularies."""
        costs = self.cut_s if cut else self.guess_s
        assert costs is not None
        return self._at(costs, streams)

    def _decoder(self, sequences: int, rows: int) -> float:
        """Sequences cost what they do alone; their drafts what rows cost together."""
        assert self.alone_s is not None
        drafts_s = self._at(self.decoder_s, rows) - self._at(self.decoder_s, sequences)
        return self._at(self.alone_s, sequences) + drafts_s

    def _at(self, costs: tuple[float, ...], rows: int) -> float:
        i = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        share = (rows - self.rows[i - 1]) / (self.rows[i] - self.rows[i - 1])
        return costs[i - 1] + max(share, 0.0) * (costs[i] - costs[i - 1])


def _rising(costs: tuple[float, ...]) -> tuple[float, ...]:
    """The largest rising curve that is nowhere above a measurement: disturbance only ever adds."""
    return tuple(accumulate(reversed(costs), min))[::-1]


class GoodputDrafts:
    """The drafts with the best expected tokens a second."""

    def __init__(self, costs: RowCosts) -> None:
        self._costs = costs
        self.kept = 1.0
        self._decided_for = 0  # wishes, when it was last decided how many streams run
        self._age = 0  # steps since then
        self._chains = 0  # in the last step

    def floor(self, sequences: int) -> float:
        """Somewhat below the chance at which the first draft pays."""
        none_s = self._costs.step_s(sequences, 0)
        row_s = self._costs.step_s(sequences, 1) - none_s
        return max(LEAST_SURVIVAL, FLOOR_SHARE * min(row_s * sequences / none_s, 1.0))

    def streams(self, wishes: Sequence[DraftWish], sequences: int) -> list[int]:
        """As many of an adapter's streams as are worth more than they cost, if all together are.

        What a stream will find is not known before it runs, only what it found of late: how often it made a draft likely
        enough that verifying it pays, and by how much.
        """
        if not wishes:
            return []
        self._age += 1
        changed = abs(len(wishes) - self._decided_for) > CHANGE * self._decided_for
        if changed or self._age >= len(wishes) // DECIDE_SHARE or any(wish.worth.length is None for wish in wishes):
            self._decide(wishes, sequences)
            self._decided_for, self._age = len(wishes), 0
        lengths = [min(wish.worth.length or 0, wish.most) for wish in wishes]
        self._probe(wishes, lengths)
        return lengths

    def _decide(self, wishes: Sequence[DraftWish], sequences: int) -> None:
        none_s, count = self._costs.step_s(sequences, 0), len(wishes)
        others, drafts = round(self.kept * max(self._chains - count, 0)), max(1, round(self.kept * count))
        beside_s = self._costs.step_s(sequences, others)
        row_s = (self._costs.step_s(sequences, others + drafts) - beside_s) / drafts
        token_s = none_s / sequences
        benefits = [0.0, *(max(0.0, (level + 0.5) / LEVELS * token_s - row_s) for level in range(1, LEVELS))]
        gained = sum(self._decide_alike([w for w in wishes if w.cut is cut], benefits) for cut in (False, True))
        if gained < LEAST_GAIN * none_s * count / sequences:
            for wish in wishes:
                wish.worth.length = 0

    def _decide_alike(self, wishes: Sequence[DraftWish], benefits: Sequence[float]) -> float:
        """Of wishes that all pick from draft vocabularies, or none; the seconds that their streams gain, costs taken off."""
        if not wishes:
            return 0.0
        count, cut = len(wishes), wishes[0].cut
        first_s = self._costs.streams_s(count, cut)
        stream_s = (self._costs.streams_s(2 * count, cut) - first_s) / count
        adapters: dict[int, tuple[StreamWorth, list[int]]] = {}
        for wish in wishes:
            adapters.setdefault(id(wish.worth), (wish.worth, []))[1].append(wish.most)
        gained = stream_s * count - first_s  # any at all cost something
        for worth, mosts in adapters.values():
            gains = [0.0, *accumulate(worth.gain(i, benefits) - stream_s for i in range(max(mosts)))]
            worth.length = max(range(len(gains)), key=gains.__getitem__)
            gained += sum(gains[min(worth.length, most)] for most in mosts)
        if gained > 0.0:
            return gained
        for worth, _ in adapters.values():
            worth.length = 0
        return 0.0

    def keep(self, survivals: Sequence[Sequence[float]], sequences: int) -> list[int]:
        """Of all drafts those with the highest chances, as many as give the best goodput."""
        if not survivals:
            return []
        self._chains = len(survivals)
        if not any(survivals):
            self.kept *= 1 - KEPT_SHARE
            return [0] * len(survivals)
        counts, sums = [0] * LEVELS, [0.0] * LEVELS
        for chain in survivals:
            for chance in chain:
                level = int(chance * LEVELS)
                counts[level] += 1
                sums[level] += chance
        least, gained, drafts = LEVELS, 0.0, 0
        best = sequences / self._costs.step_s(sequences, 0) * (1 + LEAST_GAIN * len(survivals) / sequences)
        for level in range(LEVELS - 1, -1, -1):
            if counts[level]:
                drafts += counts[level]
                gained += sums[level]
                goodput = (sequences + gained) / self._costs.step_s(sequences, drafts)
                if goodput > best:
                    best, least = goodput, level
        bound = least / LEVELS
        kept = [sum(chance >= bound for chance in chain) for chain in survivals]  # chances fall along a chain
        self.kept += KEPT_SHARE * (sum(kept) / len(kept) - self.kept)
        return kept

    def _probe(self, wishes: Sequence[DraftWish], lengths: list[int]) -> None:
        """What was learnt of an adapter long ago may have changed with its prompts: try one stream more now and then."""
        asked: set[int] = set()
        for i, wish in enumerate(wishes):
            worth = wish.worth
            if lengths[i] < wish.most and id(worth) not in asked:
                asked.add(id(worth))
                worth.untried_steps += 1
                if worth.untried_steps >= PROBE_EVERY:
                    worth.untried_steps = 0
                    lengths[i] += 1
