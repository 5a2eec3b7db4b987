"""What chat and text calls do before their first token: they are charged to their tenant's quota, and begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastapi import Request

from slipstream.api.catalog import Target
from slipstream.api.connection import while_connected
from slipstream.api.generation import Ending, Generation, called_of
from slipstream.api.metering import needed_tokens
from slipstream.api.observing import note_call, note_ending
from slipstream.api.runtime import Runtime
from slipstream.errors import ClientError, Overloaded
from slipstream.metrics.gateway import Called, Outcome
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

    called = called_of(target, wanted[0].tenant)
    runtime.metrics.begun(called, target.version)

    def settle(ending: Ending) -> None:
        _count(runtime, called, ending)
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


def _count(runtime: Runtime, called: Called, ending: Ending) -> None:
    metrics, error = runtime.metrics, ending.error
    if error is None:
        outcome = Outcome.OK if ending.whole else Outcome.CANCELLED
    else:
        outcome = Outcome.REFUSED if isinstance(error, ClientError) else Outcome.FAILED
    metrics.ended(called, outcome, ending.counts.prompt_tokens, ending.counts.completion_tokens)
    if outcome is Outcome.FAILED and ending.begun:
        metrics.broke(called)
    if isinstance(error, Overloaded):
        metrics.rejected(called.tenant, error.code)


def _prompts(wanted: GenerateRequest) -> Sequence[str | tuple[int, ...]]:
    if wanted.messages is not None:
        return [message.content for message in wanted.messages]
    return [wanted.token_ids if wanted.token_ids is not None else wanted.text or ""]
