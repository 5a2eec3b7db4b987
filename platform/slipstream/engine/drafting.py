"""Speculation as the scheduler sees it: which streams run, which drafts are verified, what is learnt of them. Pure Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from slipstream.engine.chains import Beliefs, Chain
from slipstream.engine.copying import NOTHING, CopyIndex
from slipstream.engine.goodput import DraftPolicy, DraftWish, FullDrafts, StreamWorth
from slipstream.engine.sequence import Sequence as Request

ADAPTERS_KEPT = 4096
IDLE_KEPT = 0.02  # with fewer drafts of a chain verified, copies are looked for …
IDLE_TURNS = 4  # … every so many steps only


@dataclass(slots=True)
class _Known:
    """Of one adapter."""

    beliefs: Beliefs = field(default_factory=Beliefs)
    worth: StreamWorth = field(default_factory=StreamWorth)


class Drafting:
    """Owner of what is known of adapters' drafts; the base model's are known by None."""

    def __init__(self, policy: DraftPolicy | None = None, *, copies: bool = True) -> None:
        """`policy` None: all drafts always. `copies`: whether drafts may be copied from prompt and answer."""
        self._policy = policy or FullDrafts()
        self._copies = copies
        self._adapters: OrderedDict[str | None, _Known] = OrderedDict()
        self._turn = 0

    def choose(self, decodes: Sequence[Request], at_work: int) -> None:
        """Give the sequences that decode in this step, of all that are `at_work`, the drafts to verify."""
        self._turn += 1
        seldom = self._policy.kept < IDLE_KEPT
        drafting = []
        for i, seq in enumerate(decodes, self._turn):
            looked_at = seq.draft_cap and (seq.guesses or not seldom or i % IDLE_TURNS == 0)
            seq.chain = self._chain(seq) if looked_at else None
            if seq.chain is not None:
                drafting.append(seq.chain)
        lengths = self._policy.keep([chain.survivals for chain in drafting], at_work)
        for chain, length in zip(drafting, lengths, strict=True):
            del chain.tokens[length:]

    def _chain(self, seq: Request) -> Chain | None:
        """What is proposed for a sequence; None = nothing."""
        most, copy = min(seq.draft_cap, seq.remaining - 1), NOTHING
        if self._copies:
            if seq.copy_index is None:
                seq.copy_index = CopyIndex()
            copy = seq.copy_index.find(seq.tokens, most)
        if not seq.guesses and copy is NOTHING:
            return None
        known = self._known(seq.adapter)
        chain = known.beliefs.chain(seq.guesses, copy, most, self._policy.floor)
        if seq.guesses:
            known.worth.observe(chain.gains, len(seq.guesses))
        return chain

    def streams(self, wanted: Sequence[tuple[Request, int]], at_work: int) -> list[int]:
        """How many streams to run for each of the sequences, of the most it has use for."""
        wishes = [DraftWish(self._known(seq.adapter).worth, most) for seq, most in wanted]
        return self._policy.streams(wishes, at_work)

    def learn(self, seq: Request, said: Sequence[int]) -> None:
        """A step emitted `said` for a sequence."""
        if seq.chain is not None:
            self._known(seq.adapter).beliefs.learn(seq.chain, said)
            seq.chain = None

    def _known(self, adapter: str | None) -> _Known:
        known = self._adapters.get(adapter)
        if known is None:
            known = self._adapters[adapter] = _Known()
        self._adapters.move_to_end(adapter)
        if len(self._adapters) > ADAPTERS_KEPT:
            self._adapters.popitem(last=False)
        return known
