"""Data between the scheduler and the runner: what one step computes, and what came of it. No behaviour, no torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from slipstream.protocol import SamplingParams


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """One sequence's part of a step: `tokens` are run at positions start … start+len-1.

    When `samples` is true the last 1 + num_drafts tokens are [last known token, draft 1, … draft k] and their logits are
    verified; otherwise this is a prefill chunk that does not reach the end.
    """

    seq_id: int
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]  # the block table, long enough for start + len(tokens)
    samples: bool
    num_drafts: int
    slot: int  # adapter slot, -1 = base
    params: SamplingParams
    output_index: int  # index, in the answer, of the first token this step decides (keys the sampling noise)
    draft_next: int = 0  # streams to run for the next step …
    draft_among: array[int] | None = None  # … and the ids among which they pick, int32; None = all
    history: tuple[int, ...] = ()  # prompt + answer, only when a penalty needs it
    prompt_len: int = 0


class BlockCopy(NamedTuple):
    """Keys and values of a block that a sequence begins another one with."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `sequences` with drafts and decodes first, prefill chunks after.

    `copies` come before all of them, each from what was there before the step: a source may be a target, or one of the
    blocks that the step fills.
    """

    sequences: tuple[PlannedSequence, ...]
    copies: tuple[BlockCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Token rows of the step."""
        return sum(len(s.tokens) for s in self.sequences)


class Pick(NamedTuple):
    """A token picked from a row of logits, and how far its score was ahead of the next (a sampled row: with noise)."""

    token: int
    margin: float


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one decided token: natural log-probability, and the best alternatives (id, log-probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What a step decided for one sampling sequence: accepted drafts, then one corrected or bonus token."""

    tokens: tuple[int, ...]  # 1 … num_drafts+1
    guesses: tuple[Pick, ...] = ()  # by its streams, for the tokens after these
    logprobs: tuple[Logprob, ...] = ()
    broken: bool = False  # the hidden state is not finite: the adapter's weights overflow; `tokens` is empty


@dataclass(frozen=True, slots=True)
class StepResult:
    """seq_id → result, for the sequences that sampled."""

    results: dict[int, SequenceResult] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Emission:
    """What commit added to one sequence."""

    seq_id: int
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finished: bool
    broken: bool = False  # finished because nothing sensible came out
    judged: int = (
        0  # leading guesses of the streams that a token of this emission speaks for or against, drafted or not
    )
    accepted: int = 0  # of these, how many were right: all before the first wrong one
