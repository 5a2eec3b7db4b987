"""One `generate` call as the engine sees it: its choices, and the events that its caller is handed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextvars import Context
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from slipstream.engine.plan import Emission, Logprob
from slipstream.engine.sequence import Sequence
from slipstream.engine.text import ChoiceText, token_bytes
from slipstream.errors import SlipstreamError
from slipstream.protocol import AdapterRef, GenerateEvent, TokenLogprob, Usage


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence of one call."""

    index: int
    seq: Sequence
    text: ChoiceText
    call: Call
    held: list[GenerateEvent] = field(default_factory=list)  # the step thread's: what nobody waits for before the end

    def ready(self, event: GenerateEvent) -> list[GenerateEvent]:
        """What the caller is woken for after a step that gave this choice an event."""
        if self.call.streamed:
            return [event]
        self.held.append(event)
        return self.held if event.finish_reason is not None else []

    def event(self, emission: Emission, tokenizer: PreTrainedTokenizerBase) -> GenerateEvent:
        """What a step added."""
        seq, usage, logprobs = self.seq, None, None
        if emission.finished or seq.num_answer == len(emission.tokens):
            usage = Usage(
                seq.prompt_len, seq.num_answer, seq.decode_steps, seq.drafted, seq.accepted, seq.cached_prompt,
                seq.judged, seq.right,
            )  # fmt: skip
        if seq.params.logprobs is not None:
            pairs = zip(emission.tokens, emission.logprobs, strict=True)
            logprobs = tuple(_token_logprob(tokenizer, token, lp) for token, lp in pairs)
        return GenerateEvent(
            self.index, self.text.take(emission.finished), emission.tokens, logprobs, seq.finish_reason, usage
        )


@dataclass(slots=True, eq=False)
class Call:
    """`queue` lives on the event loop. `choices`: as they were submitted."""

    adapter: AdapterRef | None
    allowed_wait_s: float
    context: Context  # of the caller: what is logged on its behalf says whose request it is
    streamed: bool
    queue: asyncio.Queue[list[GenerateEvent] | SlipstreamError] = field(default_factory=asyncio.Queue)
    choices: list[Choice] = field(default_factory=list)


def put_all(ready: Iterable[tuple[Call, list[GenerateEvent]]]) -> None:
    """On the event loop: hand each caller its events."""
    for call, events in ready:
        call.queue.put_nowait(events)


def _token_logprob(tokenizer: PreTrainedTokenizerBase, token: int, lp: Logprob) -> TokenLogprob:
    def piece(token_id: int, value: float) -> TokenLogprob:
        raw = token_bytes(tokenizer, token_id)
        return TokenLogprob(raw.decode("utf-8", "replace"), token_id, value, raw)

    chosen = piece(token, lp.logprob)
    return TokenLogprob(chosen.token, token, lp.logprob, chosen.utf8, tuple(piece(i, v) for i, v in lp.top))
