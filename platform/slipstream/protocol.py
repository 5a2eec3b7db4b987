"""What crosses the border between the HTTP side and an engine: plain data, no torch, no Ray, no HTTP.

`EngineClient` is the seam. Its real implementations are `slipstream.engine.service.EngineService` (in this process) and the
Ray handle in `deployments`; its public fake is `slipstream.testing.FakeEngine`. All pass the same contract tests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class FinishReason(StrEnum):
    """Why a choice ended."""

    STOP = "stop"  # end of sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context window
    ABORTED = "aborted"  # cancelled by the caller; never sent over HTTP


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Ranges are checked by `validate`; the names are those of OpenAI and vLLM."""

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer, as in Hugging Face
    presence_penalty: float = 0.0  # over the answer, as in OpenAI
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int = 0  # unsigned 64-bit; the gateway draws one when the client sends none, so that a retry repeats the text
    max_tokens: int | None = None  # None = up to the context window
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # number of alternatives per token (0 = only the chosen one); None = off
    n: int = 1

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether they are changed at every position, before the temperature."""
        return self.has_penalties or bool(self.logit_bias)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn; text only."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What travels below the gateway: a digest and whose blobs hold it. Never a name."""

    tenant: str
    digest: str  # "sha256:<hex>", also the name of the manifest blob


Speculation = bool | int | None  # None = "auto"; True / False; or a maximum draft length


@dataclass(frozen=True, slots=True)
class ChoiceProgress:
    """What the caller already has of a choice whose replica went away: the next replica goes on from there, and repeats
    nothing. Noise is keyed by position, so it goes on with the same text."""

    token_ids: tuple[int, ...] = ()
    decode_steps: int = 0  # that gave these tokens; tokens beyond one a step were accepted drafts
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from, for logs and traces. Nothing in it changes an answer."""

    request_id: str  # the HTTP request's, `x-request-id`
    traceparent: str | None = None  # W3C, of the span beneath which whoever gets this draws its own
    tracestate: str | None = None
    log_prompts: bool = False  # its tenant has switched on that prompts are logged

    @property
    def sampled(self) -> bool:
        """Whether somebody keeps this request's trace."""
        return self.traceparent is not None and bool(int(self.traceparent[-2:], 16) & 1)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One call: exactly one of `text`, `token_ids` and `messages` is set."""

    request_id: str
    tenant: str  # part of the prefix cache's key
    params: SamplingParams
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    adapter: AdapterRef | None = None  # None = the base model
    speculation: Speculation = None
    stream: bool = True  # False: the caller only wants the end, so an engine may send everything in one batch
    priority: int = 0  # lower ones start first, among those of the same tenant
    max_wait_s: float | None = (
        None  # refused with `Overloaded` rather than begun later than this; None = the engine's own
    )
    progress: tuple[ChoiceProgress, ...] = ()  # of each choice, when another replica has begun this request; else empty
    weight: float = 1.0  # of its tenant: twice the weight is twice the share of a busy engine
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token under the model's own distribution (before penalties and temperature), in nats."""

    token: str
    token_id: int
    logprob: float
    utf8: bytes
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one choice, in tokens and engine steps."""

    prompt_tokens: int
    completion_tokens: int  # end of sequence counted
    decode_steps: int  # engine steps that emitted for this choice, the one that ends prefill included
    drafted_tokens: int
    accepted_tokens: int
    cached_prompt_tokens: int = 0
    judged_tokens: int = 0  # what the adapter's own streams proposed and the model then decided, drafted or not …
    right_tokens: int = 0  # … and said, too


PROMPT_WEIGHT = 0.2  # work of a prompt token in answer tokens: they are computed many at a time (benchmarks/README.md)


def work(prompt_tokens: int, completion_tokens: int) -> float:
    """What a request costs, in answer tokens."""
    return completion_tokens + PROMPT_WEIGHT * prompt_tokens


@dataclass(frozen=True, slots=True)
class GenerateEvent:
    """What one engine step added to one choice. The last event of a choice has `finish_reason` and `usage`; the first has
    its usage so far, so that a caller who leaves early knows what it used."""

    index: int  # the choice, 0 … n-1
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class BaseModelSpec:
    """What an adapter is checked against; JSON-serialisable through `dataclasses.asdict`."""

    id: str
    base_digest: str  # "sha256:<hex>" over the base's config and tensors
    hidden_size: int
    vocab_size: int
    num_layers: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    linears: Mapping[str, tuple[int, int]]  # module path, e.g. "model.layers.0.self_attn.q_proj" -> (out, in) features


@dataclass(frozen=True, slots=True)
class Queued:
    """Sequences of one tenant and priority that wait for room."""

    tenant: str
    weight: float
    priority: int
    count: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /metrics, readiness and routing."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    steps: int
    prompt_tokens: int  # totals since start
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    prefix_hit_tokens: int
    adapters: Mapping[str, str]  # digest -> Residency name
    sequences: int = 0  # asked for, choices counted; total since start
    finished: int = 0  # of those, ended, however
    work_tokens: float = 0.0  # answer tokens so far, and prompt tokens as what they cost in them
    queue_wait_s: float = 0.0  # of the sequence that waits longest for room, not for its adapter
    queue: tuple[Queued, ...] = ()  # sequences that wait for room
    starts_per_s: float | None = None  # while others wait; None = nobody does
    adapter_slots: int = 0
    slots_free: int = 0  # slots that no running request holds
    adapters_wanted: int = 0  # adapters of waiting requests that are in no slot
    replicas: int = 1  # that these are the counters of; 0 = scaled to zero, the next request wakes one


class EngineClient(Protocol):
    """An engine as the HTTP side sees it."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[list[GenerateEvent], None]:
        """Yield the events of each engine step. Closing the iterator cancels the request and frees its blocks.

        The first `__anext__` raises `InvalidRequest`, `ContextOverflow`, `Overloaded` or `AdapterUnavailable` before
        anything was produced, so that the caller can still choose the HTTP status.
        """
        ...

    async def describe(self) -> BaseModelSpec:
        """The base model behind this engine."""
        ...

    async def stats(self) -> EngineStats:
        """A snapshot of the engine's counters."""
        ...
