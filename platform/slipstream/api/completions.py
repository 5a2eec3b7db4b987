"""POST /v1/completions."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, PlainValidator, model_validator

from slipstream.api.answers import LOWEST_LOGPROB, Reply, usage_body
from slipstream.api.auth import CallerDep
from slipstream.api.calls import begin
from slipstream.api.connection import while_connected
from slipstream.api.errors import request_id_of
from slipstream.api.fields import MAX_CHOICES, SamplingFields, TokenId, is_text, refused
from slipstream.api.generation import Generation
from slipstream.api.runtime import RuntimeDep
from slipstream.api.sse import EventStream, Json
from slipstream.protocol import GenerateRequest, TokenLogprob

router = APIRouter(tags=["OpenAI"])
Prompt = str | tuple[int, ...]
_DEFAULT_MAX_TOKENS = 16  # OpenAI's


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise refused("prompt", "'prompt' must not be empty.")
        if not is_text(value):
            raise refused("prompt", "'prompt' holds half of a surrogate pair, which is not text.")
        return value
    if isinstance(value, list) and value and all(map(_is_token_id, value)):
        return tuple(value)
    raise refused(
        "prompt",
        "'prompt' is a text, a list of texts, a list of token ids, or a list of such lists; none may be empty.",
    )


def _prompts(value: Any) -> list[Prompt]:
    """The four forms of OpenAI's `prompt`, as a list."""
    if isinstance(value, list) and value and not _is_token_id(value[0]):
        return [_prompt(each) for each in value]
    return [_prompt(value)]


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    refused_fields: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "suffix": ((), "models here continue a prompt, they do not fill a gap."),
        "best_of": ((), "use 'n'."),
        "messages": ((), "send them to /v1/chat/completions."),
        "max_completion_tokens": ((), "it is a field of /v1/chat/completions; use 'max_tokens'."),
        "top_logprobs": ((), "it is a field of /v1/chat/completions; use 'logprobs' with a number."),
        "response_format": (({"type": "text"},), "only {'type': 'text'} is."),
    }

    prompt: Annotated[
        Any, PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]])
    ]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_text(self) -> CompletionRequest:
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise refused("prompt", f"One request may ask for {MAX_CHOICES} choices at most, prompts times 'n'.")
        if self.echo and self.logprobs is not None:
            raise refused("echo", "'echo' cannot be combined with 'logprobs': prompts are not scored here.")
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise refused("echo", "'echo' needs prompts of text: token ids are not turned back into text.")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, whatever form they came in."""
        prompts: list[Prompt] = self.prompt
        return prompts

    def token_limit(self) -> int:
        """OpenAI's default for this route is small."""
        return self.max_tokens or max(_DEFAULT_MAX_TOKENS, self.min_tokens or 0)


@dataclass(slots=True)
class _Shown:
    """What a choice has shown so far: the echo to come and where its next token's text begins."""

    echo: str
    offset: int
    # Half a character has no text yet: the token that completes it brings all of it.
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Continue one or several prompts; the same fields as OpenAI's, and `speculation`, `top_k`, `min_p` and friends."""
    tenant = caller.acting_tenant()
    target = await runtime.catalog.resolve(caller, body.model, body.user, split=True)
    reply = Reply("cmpl-" + secrets.token_hex(12), int(time.time()), target)
    params = body.sampling(body.logprobs)
    requests = [
        GenerateRequest(
            request_id=f"{reply.id}-{number}",
            tenant=tenant,
            params=params,
            text=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
            adapter=target.adapter,
            speculation=body.speculation,
            stream=bool(body.stream),
            priority=body.priority or 0,
            max_wait_s=body.max_wait_s,
        )
        for number, prompt in enumerate(body.prompts)
    ]
    echoes = [str(prompt) if body.echo else "" for prompt in body.prompts for _ in range(params.n)]
    shown = [_Shown(echo, len(echo)) for echo in echoes]
    generation, headers = await begin(request, runtime, reply.id, target, requests)
    if body.stream:
        chunks = _chunks(reply, generation, shown, body.include_usage)
        return EventStream(chunks, generation, request_id_of(request), headers)
    answer = await while_connected(request.receive, _whole(reply, generation, shown))
    return JSONResponse(answer, headers=dict(headers))


async def _whole(reply: Reply, generation: Generation, shown: list[_Shown]) -> Json:
    choices = [
        {
            "index": index,
            "text": shown[index].echo + "".join(choice.text),
            "logprobs": _logprobs(choice.logprobs, shown[index]) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(await generation.collect())
    ]
    return {**reply.head("text_completion"), "choices": choices, "usage": usage_body(generation)}


async def _chunks(
    reply: Reply, generation: Generation, shown: list[_Shown], include_usage: bool
) -> AsyncGenerator[list[Json]]:
    head = reply.head("text_completion") | ({"usage": None} if include_usage else {})
    async for batch in generation.events():
        chunks = []
        for event in batch:
            state = shown[event.index]
            text, state.echo = state.echo + event.text, ""
            if text or event.logprobs or event.finish_reason:
                scores = _logprobs(event.logprobs, state) if event.logprobs else None
                choice = {"index": event.index, "text": text, "logprobs": scores, "finish_reason": event.finish_reason}
                chunks.append({**head, "choices": [choice]})
        yield chunks
    if include_usage:
        yield [{**head, "choices": [], "usage": usage_body(generation)}]


def _logprobs(tokens: Sequence[TokenLogprob], state: _Shown) -> Json:
    """OpenAI's older format: parallel lists."""
    offsets = []
    for token in tokens:
        offsets.append(state.offset)
        state.offset += len(state.decoder.decode(token.utf8))
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [max(token.logprob, LOWEST_LOGPROB) for token in tokens],
        "top_logprobs": [{_name(other): max(other.logprob, LOWEST_LOGPROB) for other in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _name(token: TokenLogprob) -> str:
    """Its text, or its bytes as OpenAI spells them: parts of characters all look alike as text."""
    try:
        token.utf8.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.utf8)
    return token.token
