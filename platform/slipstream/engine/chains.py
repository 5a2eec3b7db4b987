"""Chains of drafts, and how likely they are: what streams and copies propose, judged by what the model then says.

A stream's best token is right nearly always when it is far ahead of the next one, and hardly ever when it is not; what was
copied after a long match is right more often than after a short one; and what both propose is almost certain. How often each
was so is counted for every adapter, since good and poor speculators have margins alike. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slipstream.engine.copying import LONGEST_MATCH, NOTHING, Copied
from slipstream.engine.plan import Pick

MARGINS = 9  # classes of a margin: below 1, below 2, … and from 8 on
SURE_MARGINS = 4  # the same where a copy says so, too
PRIOR_WEIGHT = 8.0  # judgements that a prior counts for
TRUST_WEIGHT = 2.0  # right drafts that trust in priors begins with
MOST_CERTAIN = 0.98
MEMORY = 0.99  # what a judgement still counts for, one judgement of the same evidence later

# Evidence of streams comes first: of the next token apart from those after it, and apart where a copy says something else.
_CONTRADICTED = 2 * MARGINS
_MATCH = 4 * MARGINS
_OTHER_COPY = _MATCH + LONGEST_MATCH
_BOTH = _OTHER_COPY + LONGEST_MATCH
NUM_EVIDENCE = _BOTH + SURE_MARGINS
# What was seen on the demo adapters, nearer to a half: an adapter's own counts soon say more.
_STREAM_PRIORS = (0.3, 0.45, 0.65, 0.75, 0.85, 0.9, 0.93, 0.95, 0.95)
_MATCH_PRIORS = tuple(min(0.35 + 0.07 * length, 0.8) for length in range(1, LONGEST_MATCH + 1))
_PRIORS = (
    *4 * _STREAM_PRIORS,
    *_MATCH_PRIORS,
    *(0.8 * prior for prior in _MATCH_PRIORS),
    *[0.9] * SURE_MARGINS,
)
_KIND = (*[0] * _MATCH, *[1] * 2 * LONGEST_MATCH, *[2] * SURE_MARGINS)  # of evidence: streams, copies, both
_NUM_KINDS = 3


def streamed(position: int, margin: float, contradicted: bool = False) -> int:
    """Evidence for a draft by a stream alone; a copy may say something else. A margin that is no number is that of a sequence
    that ends now."""
    index = int(margin) if margin < MARGINS else MARGINS - 1
    return index + (MARGINS if position else 0) + (_CONTRADICTED if contradicted else 0)


def matched(length: int) -> int:
    """Evidence for a copy after a match of so many tokens, drafts before it included, whatever streams say."""
    return _MATCH + min(length, LONGEST_MATCH) - 1


def contradicted(length: int) -> int:
    """Evidence for a copy where a stream says something else."""
    return _OTHER_COPY + min(length, LONGEST_MATCH) - 1


def agreed(margin: float) -> int:
    """Evidence for a stream's draft that is copied as well."""
    return _BOTH + (int(margin) if margin < SURE_MARGINS else SURE_MARGINS - 1)


class Claim(NamedTuple):
    """A token proposed, and what speaks for it."""

    token: int
    evidence: int


@dataclass(slots=True)
class Chain:
    """Drafts for one sequence's next tokens. `claims`: all that was proposed at each position, one further than drafts go."""

    tokens: list[int] = field(default_factory=list)
    survivals: list[float] = field(default_factory=list)  # P(a draft and all before it are right): never rises
    claims: list[tuple[Claim, ...]] = field(default_factory=list)
    ran: int = 0  # positions for which a stream ran
    gains: list[float] = field(default_factory=list)  # what the stream of each of these added to the draft's survival


class Beliefs:
    """What is known of one adapter's drafts.

    A chance is what was counted for its evidence, added to a prior; the prior is as good as other evidence of its kind was
    found to be, so that a useless speculator is known for one before every margin was seen. Nothing is ever certain:
    chances stay between 0 and 1.
    """

    __slots__ = ("_expected", "_found", "_judged", "_right", "_trust")

    def __init__(self) -> None:
        self._right = [0.0] * len(_PRIORS)
        self._judged = [0.0] * len(_PRIORS)
        self._found = [TRUST_WEIGHT] * _NUM_KINDS  # right drafts by kind …
        self._expected = [TRUST_WEIGHT] * _NUM_KINDS  # … and as many as priors promised
        self._trust = [1.0] * _NUM_KINDS

    def chance(self, evidence: int) -> float:
        """P(a draft with this evidence is right | all before it are)."""
        prior = min(_PRIORS[evidence] * self._trust[_KIND[evidence]], MOST_CERTAIN) * PRIOR_WEIGHT
        return (self._right[evidence] + prior) / (self._judged[evidence] + PRIOR_WEIGHT)

    def observe(self, evidence: int, right: bool) -> None:
        """One draft with this evidence was judged."""
        kind = _KIND[evidence]
        self._right[evidence] = MEMORY * self._right[evidence] + right
        self._judged[evidence] = MEMORY * self._judged[evidence] + 1.0
        self._found[kind] = MEMORY * self._found[kind] + right
        self._expected[kind] = MEMORY * self._expected[kind] + _PRIORS[evidence]
        self._trust[kind] = self._found[kind] / self._expected[kind]

    def learn(self, chain: Chain, said: Sequence[int]) -> None:
        """`said` are the tokens that the model decided where `chain` was proposed. Whatever was proposed is judged, verified
        or not, as long as the chain was right before it."""
        for position, (proposed, token) in enumerate(zip(chain.claims, said, strict=False)):
            for claim in proposed:
                self.observe(claim.evidence, claim.token == token)
            if position == len(chain.tokens) or chain.tokens[position] != token:
                return

    def chain(self, guesses: Sequence[Pick], copy: Copied = NOTHING, most: int = 1 << 30, floor: float = 0.0) -> Chain:
        """At each position the likelier of what streams and copy propose, as long as the chain so far is theirs; up to `most`
        drafts, and as long as one survives with a chance of `floor`. What streams gained is found for all of them."""
        chain = Chain(ran=min(len(guesses), most))
        on_stream, on_copy = len(guesses), len(copy.tokens)  # positions where they still propose
        survival, offered = 1.0, True
        for position in range(min(most, max(on_stream, on_copy))):
            guess = guesses[position] if position < on_stream else None
            token = copy.tokens[position] if position < on_copy else None
            length = copy.matched + position
            claims = _claims(position, guess, token, length)
            if not claims:
                break
            if offered:
                chain.claims.append(claims)
            chance, best = self._best(claims, one=guess is None or token is None or token == guess.token)
            without = survival * self.chance(matched(length)) if token is not None else 0.0
            survival *= chance
            offered = offered and survival >= floor
            if guess is not None:
                chain.gains.append(max(survival - without, 0.0))
                if guess.token != best:
                    on_stream = 0
            elif not offered:
                break
            if offered:
                chain.tokens.append(best)
                chain.survivals.append(survival)
            if token != best:
                on_copy = 0
        return chain

    def _best(self, claims: tuple[Claim, ...], one: bool) -> tuple[float, int]:
        """The chance and token of the likelier claim; of the only one, if there is `one`."""
        first = self.chance(claims[0].evidence)
        if one:
            return first, claims[0].token
        second = self.chance(claims[1].evidence)
        return (first, claims[0].token) if first >= second else (second, claims[1].token)


def _claims(position: int, guess: Pick | None, copy: int | None, length: int) -> tuple[Claim, ...]:
    """What a stream and a copy propose at a position: the candidates first, and the copy by itself, to be judged, last."""
    if guess is None:
        return () if copy is None else (Claim(copy, matched(length)),)
    if copy is None:
        return (Claim(guess.token, streamed(position, guess.margin)),)
    alone = Claim(copy, matched(length))
    if copy == guess.token:
        return Claim(copy, agreed(guess.margin)), alone
    own = Claim(guess.token, streamed(position, guess.margin, contradicted=True))
    return own, Claim(copy, contradicted(length)), alone
