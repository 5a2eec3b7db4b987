"""`FakeEngine`: an `EngineClient` without a model. Deterministic; takes answers ahead; can be slow, full, broken."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from slipstream.engine.observer import EngineObserver, StepFacts, Unobserved
from slipstream.errors import ContextOverflow, InvalidRequest, Overloaded, SlipstreamError
from slipstream.protocol import (
    BaseModelSpec,
    ChoiceProgress,
    EngineClient,
    EngineStats,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    TokenLogprob,
    Usage,
)

FAKE_BASE = BaseModelSpec(
    id="fake/base-1b",
    base_digest="sha256:" + hashlib.sha256(b"fake/base-1b").hexdigest(),
    hidden_size=8,
    vocab_size=1000,
    num_layers=1,
    context_length=256,
    eos_token_ids=(0,),
    has_chat_template=True,
    linears={"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.down_proj": (8, 16)},
)
_WORDS = ("swift", "river", "quiet", "amber", "stone", "ember", "cloud", "north", "paper", "violet", "grain", "harbour")
_ANSWER_WORDS = 12  # of an answer nobody enqueued


@dataclass(frozen=True, slots=True)
class FakeAnswer:
    """What one choice says: its tokens' texts. `fail_after` breaks the stream after that many steps."""

    tokens: tuple[str, ...]
    fail_after: int | None = None
    error: SlipstreamError | Exception | None = None


class FakeEngine(EngineClient):
    """One word is one token. A request that speculates gets two tokens a step: its own and one accepted draft."""

    def __init__(
        self,
        spec: BaseModelSpec = FAKE_BASE,
        *,
        step_delay_s: float = 0.0,
        capacity: int | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        self.spec = spec
        self.observer = observer or Unobserved()
        self.step_delay_s = step_delay_s
        self.capacity = capacity  # choices at a time; None = any number
        self.refusal: Exception | None = None  # raised by the first step of every request
        self.outage: Exception | None = None  # raised by `describe` and `stats`
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[str] = []  # ids of the requests that were closed before their end
        self.running: set[str] = set()
        self._open = 0  # choices of what runs
        self._answers: deque[FakeAnswer] = deque()
        self._totals = {"steps": 0, "prompt": 0, "completion": 0, "drafted": 0, "accepted": 0}

    def enqueue(self, *answers: str | FakeAnswer) -> None:
        """The next choices say this, one each; texts are cut into words."""
        self._answers.extend(FakeAnswer(_words(a)) if isinstance(a, str) else a for a in answers)

    async def describe(self) -> BaseModelSpec:
        """The base model it was made with."""
        if self.outage is not None:
            raise self.outage
        return self.spec

    async def stats(self) -> EngineStats:
        """Its counters; blocks are invented, one a request."""
        if self.outage is not None:
            raise self.outage
        total, busy = self.capacity or 64, len(self.running)
        digests = {request.adapter.digest: "ON_DEVICE" for request in self.requests if request.adapter}
        return EngineStats(
            running=busy,
            waiting=0,
            kv_blocks_total=total,
            kv_blocks_free=total - busy,
            steps=self._totals["steps"],
            prompt_tokens=self._totals["prompt"],
            completion_tokens=self._totals["completion"],
            drafted_tokens=self._totals["drafted"],
            accepted_tokens=self._totals["accepted"],
            preemptions=0,
            prefix_hit_tokens=0,
            adapters=digests,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[GenerateEvent]]:
        """As the protocol says; all choices of a request step together."""
        prompt_tokens = self._admit(request)
        choices = [
            _Choice(index, self._next_answer(request, index), request, prompt_tokens, self.spec)
            for index in range(request.params.n)
            if not (request.progress and request.progress[index].finished)
        ]
        self.running.add(request.request_id)
        self._open += request.params.n
        try:
            while any(not choice.done for choice in choices):
                await asyncio.sleep(self.step_delay_s)
                self._totals["steps"] += 1
                batch = [choice.step() for choice in choices if not choice.done]
                self._observe(request, batch)
                for event in batch:
                    self._count(event)
                yield batch
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.running.discard(request.request_id)
            self._open -= request.params.n

    def _observe(self, request: GenerateRequest, batch: Sequence[GenerateEvent]) -> None:
        adapter = request.adapter.digest if request.adapter else None
        tokens = sum(len(event.token_ids) for event in batch)
        self.observer.stepped(StepFacts(len(batch), tokens, max(tokens, 64), self.step_delay_s))
        for event in batch:
            if event.usage is not None and event.finish_reason is None:
                self.observer.started(adapter, 0.0)
            if adapter is not None and len(event.token_ids) > 1:
                self.observer.judged(adapter, 1, 1)

    def _admit(self, request: GenerateRequest) -> int:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        if self.capacity and request.params.n > self.capacity:  # 0: full for ever, for tests of what is full
            raise InvalidRequest(f"This engine runs {self.capacity} choices at most.", param="n")
        if self.capacity is not None and self._open + request.params.n > self.capacity:
            raise Overloaded("The engine's queue is full. Try again in a moment.", retry_after_s=2)
        if any(token >= self.spec.vocab_size for token in (*request.params.logit_bias, *(request.token_ids or ()))):
            raise InvalidRequest("A token id is outside the model's vocabulary.")
        prompt_tokens = len(_prompt_words(request))
        wanted = prompt_tokens + (request.params.max_tokens or 1)
        if wanted > self.spec.context_length:
            raise ContextOverflow(f"Prompt and answer need {wanted} tokens; the model has {self.spec.context_length}.")
        self._totals["prompt"] += prompt_tokens
        return prompt_tokens

    def _next_answer(self, request: GenerateRequest, index: int) -> FakeAnswer:
        return self._answers.popleft() if self._answers else FakeAnswer(_invented(request, index))

    def _count(self, event: GenerateEvent) -> None:
        if event.usage is not None and event.finish_reason is not None:
            self._totals["completion"] += event.usage.completion_tokens
            self._totals["drafted"] += event.usage.drafted_tokens
            self._totals["accepted"] += event.usage.accepted_tokens


class _Choice:
    """One choice being told."""

    def __init__(
        self, index: int, answer: FakeAnswer, request: GenerateRequest, prompt_tokens: int, spec: BaseModelSpec
    ) -> None:
        self._index = index
        self._answer = answer
        self._params = request.params
        self._speculates = request.speculation is not False and request.speculation != 0
        room = spec.context_length - prompt_tokens
        self._limit = min(room, self._params.max_tokens or room)
        self._vocab_size = spec.vocab_size
        done = request.progress[index] if request.progress else ChoiceProgress()
        tokens, drafts = len(done.token_ids), len(done.token_ids) - done.decode_steps
        cached = prompt_tokens if index else 0
        self._usage = Usage(prompt_tokens, tokens, done.decode_steps, drafts, drafts, cached_prompt_tokens=cached)
        self.done = False

    def step(self) -> GenerateEvent:
        """One engine step: one token, or two."""
        usage = self._usage
        if self._answer.fail_after is not None and usage.decode_steps >= self._answer.fail_after:
            raise self._answer.error or RuntimeError("the fake engine was told to fail")
        start = usage.completion_tokens
        drafts = int(self._speculates and start > 0)
        wanted = self._answer.tokens[start : start + 1 + drafts]
        tokens, finish_reason = self._cut(wanted, start)
        accepted = max(0, len(tokens) - 1)
        self._usage = replace(
            usage,
            completion_tokens=start + len(tokens),
            decode_steps=usage.decode_steps + 1,
            drafted_tokens=usage.drafted_tokens + drafts,
            accepted_tokens=usage.accepted_tokens + accepted,
            judged_tokens=usage.judged_tokens + drafts,
            right_tokens=usage.right_tokens + accepted,
        )
        self.done = finish_reason is not None
        logprobs = None if self._params.logprobs is None else tuple(map(self._logprob, tokens))
        text, ids = "".join(tokens), tuple(map(self._id, tokens))
        shown = self._usage if self.done or start == 0 else None
        return GenerateEvent(self._index, text, ids, logprobs, finish_reason, shown)

    def _cut(self, wanted: Sequence[str], start: int) -> tuple[Sequence[str], FinishReason | None]:
        for number, token in enumerate(wanted):
            if any(stop in token for stop in self._params.stop):
                return wanted[:number], FinishReason.STOP
        if start + len(wanted) >= self._limit:
            ends_here = self._limit >= len(self._answer.tokens) and not self._params.ignore_eos
            return wanted[: self._limit - start], FinishReason.STOP if ends_here else FinishReason.LENGTH
        return wanted, FinishReason.STOP if start + len(wanted) >= len(self._answer.tokens) else None

    def _logprob(self, token: str) -> TokenLogprob:
        chosen = TokenLogprob(token, self._id(token), -0.5, token.encode())
        others = tuple(
            TokenLogprob(f" alt{rank}", rank, -0.5 - rank, f" alt{rank}".encode())
            for rank in range(1, self._params.logprobs or 0)
        )
        return replace(chosen, top=(chosen, *others) if self._params.logprobs else ())

    def _id(self, token: str) -> int:
        return 1 + int.from_bytes(hashlib.sha256(token.encode()).digest()[:4], "big") % (self._vocab_size - 1)


def _words(text: str) -> tuple[str, ...]:
    first, *rest = text.split(" ")
    return (first, *(f" {word}" for word in rest))


def _prompt_words(request: GenerateRequest) -> Sequence[object]:
    if request.token_ids is not None:
        return request.token_ids
    texts = [message.content for message in request.messages] if request.messages is not None else [request.text or ""]
    return [word for text in texts for word in text.split()]


def _invented(request: GenerateRequest, index: int) -> tuple[str, ...]:
    """Words that depend on what a real answer depends on, and not on speculation, batching or the request's id."""
    greedy = request.params.temperature == 0
    seen = (request.text, request.token_ids, request.messages, request.adapter)
    draw = None if greedy else (request.params.seed, index)
    seed = hashlib.sha256(repr((seen, draw)).encode()).digest()
    return _words(" ".join(_WORDS[byte % len(_WORDS)] for byte in seed[:_ANSWER_WORDS]))
