"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from slipstream.api.answers import LOWEST_LOGPROB, Reply, usage_body
from slipstream.api.auth import CallerDep
from slipstream.api.calls import begin
from slipstream.api.connection import while_connected
from slipstream.api.errors import request_id_of
from slipstream.api.fields import SamplingFields, Text, refused
from slipstream.api.generation import Generation
from slipstream.api.runtime import RuntimeDep
from slipstream.api.sse import EventStream, Json
from slipstream.protocol import ChatMessage, GenerateRequest, TokenLogprob

router = APIRouter(tags=["OpenAI"])


def _flatten(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise refused(
                "messages", "Message content is text, or a list of parts of the form {'type': 'text', 'text': '…'}."
            )
    return "".join(part["text"] for part in content)


class TextPart(BaseModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str


Content = Annotated[Text, BeforeValidator(_flatten, json_schema_input_type=str | list[TextPart])]


class Message(BaseModel):
    """One turn. The fields below `content` are what clients send back with an answer they got; they must be empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Text | None = None  # no chat template here knows names; ignored, as other servers do
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> ChatMessage:
        """As the engine takes it; `developer` is OpenAI's newer name for `system`, which templates know."""
        return ChatMessage("system" if self.role == "developer" else self.role, self.content)


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    refused_fields: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "tools": (([],), "models here answer with text only."),
        "tool_choice": (("none", "auto"), "models here answer with text only."),
        "functions": (([],), "models here answer with text only."),
        "function_call": (("none", "auto"), "models here answer with text only."),
        "response_format": (({"type": "text"},), "only {'type': 'text'} is."),
        "modalities": ((["text"],), "only ['text'] is."),
        "audio": ((), "models here answer with text only."),
        "prediction": ((), "speculation is the adapter's own; see the field 'speculation'."),
        "reasoning_effort": ((), "models here have no reasoning levels."),
        "verbosity": ((), "models here have no verbosity levels."),
        "web_search_options": ((), "models here answer with text only."),
        "echo": ((False,), "it is a field of /v1/completions."),
        "best_of": ((), "use 'n'."),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise refused(
                "max_tokens",
                "'max_tokens' and 'max_completion_tokens' are one limit under two names, and differ. Send one.",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "'top_logprobs' needs 'logprobs': true.")
        return self

    def token_limit(self) -> int | None:
        """Either name of the limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Answer a conversation; the same fields as OpenAI's, and `speculation`, `top_k`, `min_p` and friends."""
    tenant = caller.acting_tenant()
    target = await runtime.catalog.resolve(caller, body.model, body.user, split=True)
    target.check_chat()
    reply = Reply("chatcmpl-" + secrets.token_hex(12), int(time.time()), target)
    wanted = GenerateRequest(
        request_id=reply.id,
        tenant=tenant,
        params=body.sampling((body.top_logprobs or 0) if body.logprobs else None),
        messages=tuple(message.plain() for message in body.messages),
        adapter=target.adapter,
        speculation=body.speculation,
        stream=bool(body.stream),
        priority=body.priority or 0,
        max_wait_s=body.max_wait_s,
    )
    generation, headers = await begin(request, runtime, reply.id, target, [wanted])
    if body.stream:
        chunks = _chunks(reply, generation, body.include_usage)
        return EventStream(chunks, generation, request_id_of(request), headers)
    return JSONResponse(await while_connected(request.receive, _whole(reply, generation)), headers=dict(headers))


async def _whole(reply: Reply, generation: Generation) -> Json:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": _logprobs(choice.logprobs) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(await generation.collect())
    ]
    return {**reply.head("chat.completion"), "choices": choices, "usage": usage_body(generation)}


async def _chunks(reply: Reply, generation: Generation, include_usage: bool) -> AsyncGenerator[list[Json]]:
    """Per choice: the role, then text as it comes, then the reason it ended; at last the usage, if it was asked for."""
    head = reply.head("chat.completion.chunk") | ({"usage": None} if include_usage else {})
    begun: set[int] = set()

    def chunk(index: int, delta: Json, logprobs: Sequence[TokenLogprob] = (), finish_reason: str | None = None) -> Json:
        shown = _logprobs(logprobs) if logprobs else None
        return {
            **head,
            "choices": [{"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}],
        }

    async for batch in generation.events():
        chunks = []
        for event in batch:
            if event.index not in begun:
                begun.add(event.index)
                chunks.append(chunk(event.index, {"role": "assistant", "content": ""}))
            if event.text or event.logprobs:
                chunks.append(chunk(event.index, {"content": event.text}, event.logprobs or ()))
            if event.finish_reason:
                chunks.append(chunk(event.index, {}, finish_reason=event.finish_reason))
        yield chunks
    if include_usage:
        yield [{**head, "choices": [], "usage": usage_body(generation)}]


def _logprobs(tokens: Sequence[TokenLogprob]) -> Json:
    return {
        "content": [{**_token(t), "top_logprobs": [_token(other) for other in t.top]} for t in tokens],
        "refusal": None,
    }


def _token(token: TokenLogprob) -> Json:
    return {"token": token.token, "logprob": max(token.logprob, LOWEST_LOGPROB), "bytes": list(token.utf8)}
