"""Smoke prompts: what a version answers before anybody can call it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from adapter_registry.imports import SmokePrompt
from adapter_registry.records import AdapterDraft, PromptFormat
from slipstream.adapters.rejection import Rule, reject, show
from slipstream.errors import AdapterUnavailable, ClientError, EngineFailed, Overloaded, Unavailable
from slipstream.protocol import AdapterRef, BaseModelSpec, ChatMessage, EngineClient, GenerateRequest, SamplingParams

_PATIENCE_S = 20.0  # for an engine that is busy, or an adapter that does not come
_PAUSE_S = 0.5


async def smoke_test(
    engine: EngineClient, base: BaseModelSpec, draft: AdapterDraft, prompts: Sequence[SmokePrompt]
) -> None:
    """Have each prompt answered, greedily, by a version whose files are in the blob store but that nothing names yet.

    Raises `AdapterRejected` when it cannot answer, or answers without what is expected, and `Unavailable` when the engine
    was too busy to ask.
    """
    for number, smoke in enumerate(prompts):
        try:
            answer = await _patiently(engine, _request(base, draft, smoke))
        except (AdapterUnavailable, ClientError) as error:
            reject(Rule.SMOKE_TEST, f"smoke.{number}: the adapter did not answer: {error}", f"smoke.{number}")
        if smoke.expect is not None and smoke.expect not in answer:
            reject(
                Rule.SMOKE_TEST,
                f"smoke.{number}: the answer {show(answer)} does not contain {show(smoke.expect)}.",
                f"smoke.{number}.expect",
            )


async def _patiently(engine: EngineClient, request: GenerateRequest) -> str:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _PATIENCE_S
    while True:
        try:
            return "".join([event.text async for batch in engine.generate(request) for event in batch])
        except AdapterUnavailable:  # it may be slow to come, or the blob store away for a moment
            if loop.time() > deadline:
                raise
        except (Overloaded, EngineFailed, Unavailable) as error:
            if loop.time() > deadline:
                raise Unavailable("The engine could not be asked for a smoke test in time.") from error
        await asyncio.sleep(_PAUSE_S)


def _request(base: BaseModelSpec, draft: AdapterDraft, smoke: SmokePrompt) -> GenerateRequest:
    chat = draft.prompt_format is PromptFormat.CHAT and base.has_chat_template
    return GenerateRequest(
        request_id=f"smoke-{secrets.token_hex(8)}",
        tenant=draft.tenant,
        params=SamplingParams(temperature=0.0, max_tokens=smoke.max_tokens),
        text=None if chat else smoke.prompt,
        messages=(ChatMessage("user", smoke.prompt),) if chat else None,
        adapter=AdapterRef(draft.tenant, draft.digest),
        stream=False,
    )
