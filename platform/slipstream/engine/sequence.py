"""One choice of one request, as the scheduler sees it. Pure Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from slipstream.protocol import FinishReason, SamplingParams

if TYPE_CHECKING:
    from slipstream.engine.blocks import Link
    from slipstream.engine.chains import Chain
    from slipstream.engine.copying import CopyIndex
    from slipstream.engine.plan import Pick
    from slipstream.engine.timeline import Timeline


class SequenceState(StrEnum):
    """Where a sequence stands. WAITING → RUNNING → FINISHED; preemption takes RUNNING back to WAITING."""

    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds blocks; prefilling and decoding are not told apart
    FINISHED = "finished"  # holds nothing, final


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, KV progress and limits of one choice. Owned by the scheduler once added."""

    seq_id: int
    tenant: str
    params: SamplingParams
    tokens: list[int]  # prompt, then answer
    prompt_len: int
    max_total: int  # len(tokens) never grows past this
    eos_ids: frozenset[int]
    adapter: str | None = None  # digest
    draft_cap: int = 0  # most drafts a step, from the request
    on_token: Callable[[int], bool] | None = None  # told each answer token in order; True = a stop string is complete
    priority: int = 0  # within its tenant, lower ones start first
    weight: float = 1.0  # of its tenant
    arrived: float = 0.0  # in the engine clock's seconds, like the next
    start_by: float | None = None  # dropped if it has not started by then
    timeline: Timeline | None = None  # of a request that is traced

    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None
    num_computed: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)  # of the leading full blocks of `tokens`
    num_published: int = 0
    guesses: tuple[Pick, ...] = ()  # its streams', for the tokens after tokens[-1]
    chain: Chain | None = None  # drafts that the step being run verifies
    copy_index: CopyIndex | None = None
    is_read: bool = False  # its tokens are in the adapter's draft vocabulary

    decode_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    judged: int = 0  # guesses of its streams that the model then decided on, all before them being right …
    right: int = 0  # … the same way
    cached_prompt: int = 0
    preemptions: int = 0
    paced: bool = (
        False  # its prompt takes several steps anyway, and may take more and shorter ones for the others' sake
    )

    @property
    def turn(self) -> tuple[int, int]:
        """Its place among its tenant's that wait: by priority, then by arrival, which ids count."""
        return self.priority, self.seq_id

    @property
    def begun(self) -> bool:
        """Whether its client is in the middle of its answer: preempted, or begun on a replica that went away."""
        return bool(self.preemptions or self.num_answer)

    @property
    def num_answer(self) -> int:
        """Answer tokens so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Answer tokens still allowed."""
        return self.max_total - len(self.tokens)

    def stop_reason(self, token: int) -> FinishReason | None:
        """Why it ends with this token, its last; asked once for each token, in order."""
        p = self.params
        stopped_by_text = self.on_token(token) if self.on_token is not None else False
        enough = self.num_answer >= p.min_tokens
        if enough and ((token in self.eos_ids and not p.ignore_eos) or token in p.stop_token_ids or stopped_by_text):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.remaining <= 0 else None
