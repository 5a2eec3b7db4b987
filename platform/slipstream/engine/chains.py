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
MEMORY = 0.99  # what a judgement still counts for, one judgement of the same evidence later

_COPY = 2 * MARGINS  # evidence of streams comes first, of the next token apart from those after it
_BOTH = _COPY + LONGEST_MATCH
# What was seen on the demo adapters, nearer to a half: an adapter's own counts soon say more.
_STREAM_PRIORS = (0.3, 0.45, 0.65, 0.75, 0.85, 0.9, 0.93, 0.95, 0.95)
_PRIORS = (
    *_STREAM_PRIORS,
    *_STREAM_PRIORS,
    *(min(0.35 + 0.07 * length, 0.8) for length in range(1, LONGEST_MATCH + 1)),
    *[0.9] * SURE_MARGINS,
)


def streamed(position: int, margin: float) -> int:
    """Evidence for a draft by a stream alone. A margin that is no number is that of a sequence that ends now."""
    return (MARGINS if position else 0) + (int(margin) if margin < MARGINS else MARGINS - 1)


def copied(length: int) -> int:
    """Evidence for a draft after a match of so many tokens, drafts before it included."""
    return _COPY + min(length, LONGEST_MATCH) - 1


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
    gains: list[float] = field(default_factory=list)  # what streams add to that, at each position that one ran for
    claims: list[tuple[Claim, ...]] = field(default_factory=list)


class Beliefs:
    """What is known of one adapter's drafts. Nothing is ever certain: chances stay between 0 and 1."""

    __slots__ = ("_judged", "_right", "chances")

    def __init__(self) -> None:
        self._right = [0.0] * len(_PRIORS)
        self._judged = [0.0] * len(_PRIORS)
        self.chances = list(_PRIORS)  # P(a draft is right | all before it are), by evidence

    def observe(self, evidence: int, right: bool) -> None:
        """One draft with this evidence was judged."""
        self._right[evidence] = rights = MEMORY * self._right[evidence] + right
        self._judged[evidence] = judged = MEMORY * self._judged[evidence] + 1.0
        self.chances[evidence] = (rights + _PRIORS[evidence] * PRIOR_WEIGHT) / (judged + PRIOR_WEIGHT)

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
        drafts, and as long as one survives with a chance of `floor`."""
        chain, chances = Chain(), self.chances
        on_stream, on_copy = len(guesses), len(copy.tokens)  # positions where they still propose
        survival = copies = 1.0
        for position in range(min(most, max(on_stream, on_copy))):
            claims = _claims(
                position,
                guesses[position] if position < on_stream else None,
                copy.tokens[position] if position < on_copy else None,
                copied(copy.matched + position),
            )
            if not claims:
                break
            chain.claims.append(claims)
            best = claims[0] if len(claims) == 1 else max(claims, key=lambda claim: chances[claim.evidence])
            copies = copies * chances[copied(copy.matched + position)] if position < on_copy else 0.0
            survival *= chances[best.evidence]
            if survival < floor:
                break
            chain.tokens.append(best.token)
            chain.survivals.append(survival)
            if position < len(guesses):
                chain.gains.append(max(survival - copies, 0.0))
            if position < on_copy and copy.tokens[position] != best.token:
                on_copy = 0
            if position < on_stream and guesses[position].token != best.token:
                on_stream = 0
        return chain


def _claims(position: int, guess: Pick | None, copy: int | None, match: int) -> tuple[Claim, ...]:
    """What a stream and a copy propose at a position; `match` is the evidence for the copy."""
    if guess is None:
        return () if copy is None else (Claim(copy, match),)
    if copy is None:
        return (Claim(guess.token, streamed(position, guess.margin)),)
    if copy == guess.token:
        return (Claim(copy, agreed(guess.margin)),)
    return Claim(guess.token, streamed(position, guess.margin)), Claim(copy, match)
