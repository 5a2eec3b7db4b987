"""Speculation as the scheduler sees it: which streams run, which drafts are verified, what is learnt of them. Pure Python."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slipstream.engine.chains import Beliefs, Chain
from slipstream.engine.config import FastPath
from slipstream.engine.copying import NOTHING, CopyIndex
from slipstream.engine.goodput import DraftPolicy, DraftWish, FullDrafts, GoodputDrafts, RowCosts, StreamWorth
from slipstream.engine.plan import Pick
from slipstream.engine.sequence import Sequence as Request
from slipstream.engine.vocabulary import DraftVocabulary

ADAPTERS_KEPT = 4096
IDLE_KEPT = 0.02  # with fewer drafts of a chain verified, copies are looked for …
IDLE_TURNS = 4  # … every so many steps only


class StreamsToRun(NamedTuple):
    """For one sequence's next step."""

    streams: int
    among: array[int] | None  # ids among which they pick, int32; None = all


@dataclass(slots=True)
class _Known:
    """Of one adapter."""

    beliefs: Beliefs = field(default_factory=Beliefs)
    worth: StreamWorth = field(default_factory=StreamWorth)
    vocabulary: DraftVocabulary | None = None  # of an adapter with streams


class Drafting:
    """Owner of what is known of adapters' drafts; the base model's are known by None."""

    def __init__(self, policy: DraftPolicy | None = None, *, copies: bool = True, cut: bool = False) -> None:
        """`policy` None: all drafts always. `copies`: whether drafts may be copied from prompt and answer. `cut`: whether
        streams may pick from a draft vocabulary."""
        self._policy = policy or FullDrafts()
        self._copies = copies
        self._cut = cut
        self._adapters: OrderedDict[str | None, _Known] = OrderedDict()
        self._turn = 0

    def choose(self, decodes: Sequence[Request], at_work: int) -> None:
        """Give the sequences that decode in this step, of all that are `at_work`, the drafts to verify."""
        self._turn += 1
        seldom, floor = self._policy.kept < IDLE_KEPT, 0.0
        if any(seq.draft_cap for seq in decodes):
            floor = self._policy.floor(at_work)
        drafting = []
        for i, seq in enumerate(decodes, self._turn):
            copying = self._copies and (bool(seq.guesses) or not (seldom and i % IDLE_TURNS))
            seq.chain = self._chain(seq, copying, floor) if seq.draft_cap else None
            if seq.chain is not None:
                drafting.append(seq.chain)
        lengths = self._policy.keep([chain.survivals for chain in drafting], at_work)
        for chain, length in zip(drafting, lengths, strict=True):
            del chain.tokens[length:]

    def _chain(self, seq: Request, copying: bool, floor: float) -> Chain | None:
        """What is proposed for a sequence; None = nothing."""
        most, copy = min(seq.draft_cap, seq.remaining - 1), NOTHING
        if copying:
            if seq.copy_index is None:
                seq.copy_index = CopyIndex()
            copy = seq.copy_index.find(seq.tokens, most)
        if not seq.guesses and copy is NOTHING:
            return None
        return self._known(seq.adapter).beliefs.chain(seq.guesses, copy, most, floor)

    def streams(self, wanted: Sequence[tuple[Request, int]], at_work: int) -> list[StreamsToRun]:
        """Which streams to run for each of the sequences, of the most it has use for."""
        wishes, among = [], []
        for seq, most in wanted:
            known = self._known(seq.adapter)
            if self._cut:
                if known.vocabulary is None:
                    known.vocabulary = DraftVocabulary()
                if not seq.is_read:
                    known.vocabulary.read(seq.tokens)
                    seq.is_read = True
            among.append(_vocabulary(known, seq))
            wishes.append(DraftWish(known.worth, most, among[-1] is not None))
        return list(map(StreamsToRun, self._policy.streams(wishes, at_work), among))

    def learn(self, seq: Request, said: Sequence[int]) -> None:
        """A step emitted `said` for a sequence."""
        known = self._known(seq.adapter)
        if known.vocabulary is not None:
            known.vocabulary.learn(said)
        if seq.chain is not None:
            known.beliefs.learn(seq.chain, said)
            if seq.chain.ran:
                known.worth.observe(seq.chain.gains, seq.chain.ran)
            seq.chain = None

    def _known(self, adapter: str | None) -> _Known:
        known = self._adapters.get(adapter)
        if known is None:
            known = self._adapters[adapter] = _Known()
        self._adapters.move_to_end(adapter)
        if len(self._adapters) > ADAPTERS_KEPT:
            self._adapters.popitem(last=False)
        return known


def _vocabulary(known: _Known, seq: Request) -> array[int] | None:
    """The ids that streams may pick from, if there are enough and all that is asked of them is what they score."""
    if known.vocabulary is None or not known.vocabulary.serves:
        return None
    is_plain = not seq.params.changes_logits and seq.num_answer >= seq.params.min_tokens
    return known.vocabulary.ids if is_plain else None


def judge(guesses: Sequence[Pick], said: Sequence[int]) -> tuple[int, int]:
    """Of what streams proposed, how many tokens the model decided as well, up to the first that it decided otherwise, and how
    many it said, too. It is about the streams alone: whether those were drafts, or verified, makes no difference."""
    right = 0
    for guess, token in zip(guesses, said, strict=False):
        if guess.token != token:
            return right + 1, right
        right += 1
    return right, right


def drafting_of(costs: RowCosts | None, disable: Collection[FastPath], *, cuts: bool) -> Drafting:
    """As `disable` says; `costs` None: whatever rows cost. `cuts`: whether streams can pick from a vocabulary."""
    policy = GoodputDrafts(costs) if costs is not None else None
    cut = cuts and FastPath.DRAFT_VOCABULARY not in disable
    return Drafting(policy, copies=FastPath.COPIED_DRAFTS not in disable, cut=cut)
