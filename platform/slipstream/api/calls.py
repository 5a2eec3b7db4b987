"""What chat and text calls do before their first token: they are charged to their tenant's quota, and begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastapi import Request

from slipstream.api.catalog import Target
from slipstream.api.connection import while_connected
from slipstream.api.generation import Ending, Generation
from slipstream.api.metering import needed_tokens
from slipstream.api.observing import note_call, note_ending
from slipstream.api.runtime import Runtime
from slipstream.protocol import GenerateRequest


async def begin(
    request: Request, runtime: Runtime, call_id: str, target: Target, wanted: Sequence[GenerateRequest]
) -> tuple[Generation, Mapping[str, str]]:
    """The call's generation, which has its first tokens, and headers for its answer.

    Raises `QuotaExceeded`, and what the engine refuses.
    """
    tokens = sum(needed_tokens(_prompts(each), each.params.n, each.params.max_tokens) for each in wanted)
    ticket = await runtime.meter.admit(call_id, wanted[0].tenant, target.served_as, tokens)
    origin = note_call(call_id, target, wanted, ticket.log_prompts)
    wanted = [replace(each, weight=ticket.weight, origin=origin) for each in wanted]
    if ticket.log_prompts:
        target = replace(target, keeps_texts=True)
    own = [replace(each, speculation=target.speculation(each.speculation)) for each in wanted]

    def settle(ending: Ending) -> None:
        runtime.meter.settle(ticket, ending.counts)
        runtime.outcomes.note(target, ending)
        note_ending(ending, wanted, generation.said())

    generation = Generation(target, own, runtime.services.request_timeout_s, runtime.metrics, settle)
    try:
        await while_connected(request.receive, generation.start())
    except BaseException:  # also a cancellation just when it had started: nobody else would end it
        await generation.aclose()
        raise
    runtime.shadows.send(target, wanted, generation)
    return generation, ticket.headers


def _prompts(wanted: GenerateRequest) -> Sequence[str | tuple[int, ...]]:
    if wanted.messages is not None:
        return [message.content for message in wanted.messages]
    return [wanted.token_ids if wanted.token_ids is not None else wanted.text or ""]
