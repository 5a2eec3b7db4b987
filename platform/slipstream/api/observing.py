"""What is told of one HTTP exchange: its server span, its access line, and what both learn on the way. No keys; prompts only
where their tenant has them logged."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from opentelemetry.trace import Span, StatusCode
from starlette.types import Scope

from slipstream.protocol import GenerateRequest, Origin
from slipstream.telemetry.exchange import CURRENT, Exchange, Fact
from slipstream.telemetry.logs import redacted, shortened
from slipstream.telemetry.propagation import carried

if TYPE_CHECKING:
    from slipstream.api.catalog import Target
    from slipstream.api.generation import Ending
    from slipstream.telemetry.tracing import Tracing

log = logging.getLogger("slipstream.access")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds: no spans, and lines for DEBUG alone
UNMATCHED = "unmatched"  # instead of a route
_LONGEST_PATH = 200
_NAME = re.compile(r"[!-~]{1,200}")
_STATUS = "http.response.status_code"
_INPUT, _OUTPUT = "gen_ai.input.messages", "gen_ai.output.messages"
# What the access line calls it → OpenTelemetry's name, or ours where it has none.
_ATTRIBUTES = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "decode_steps": "slipstream.decode_steps",
    "drafted_tokens": "slipstream.drafted_tokens",
    "accepted_tokens": "slipstream.accepted_tokens",
    "first_token_seconds": "gen_ai.response.time_to_first_chunk",
    "error": "error.type",
}


class Observed:
    """One exchange, from its arrival to its last byte; what runs in this context meanwhile belongs to it."""

    def __init__(self, scope: Scope, headers: Mapping[str, str], request_id: str, tracing: Tracing | None) -> None:
        self._method, self._path = scope["method"], scope["path"]
        self.exchange = Exchange(request_id)
        if tracing is not None and self._path not in _QUIET:
            attributes = {
                "http.request.method": self._method,
                "url.path": redacted(
                    self._path[:_LONGEST_PATH]
                ),  # without the query: nobody knows what clients put there
                "url.scheme": scope.get("scheme", "http"),
                "slipstream.request_id": request_id,
            }
            span = tracing.serve(self._method, headers, attributes)
            self.exchange.span, self.exchange.trace_id = span, f"{span.get_span_context().trace_id:032x}"
        self._token = CURRENT.set(self.exchange)

    def end(self, route: str, status: int) -> float:
        """The last byte is out, or nobody is there to take it. Returns the seconds it took."""
        exchange = self.exchange
        seconds = perf_counter() - exchange.began
        if exchange.span is not None:
            _end_span(exchange, exchange.span, self._method, route, status)
        level = logging.DEBUG if self._path in _QUIET else logging.INFO
        if log.isEnabledFor(level):
            own = {"method": self._method, "route": route, "status": status, "seconds": round(seconds, 6)}
            log.log(level, "%s %s %d", self._method, route, status, extra=own | exchange.facts)
        CURRENT.reset(self._token)
        return seconds


def _end_span(exchange: Exchange, span: Span, method: str, route: str, status: int) -> None:
    more: dict[str, Fact] = {_STATUS: status}
    if route != UNMATCHED:  # a path that nobody serves names no span: there are endlessly many
        span.update_name(f"{method} {route}")
        more["http.route"] = route
    facts = {_ATTRIBUTES[name]: fact for name, fact in exchange.facts.items() if name in _ATTRIBUTES}
    known = {"slipstream.tenant": exchange.tenant, "slipstream.adapter": exchange.adapter}
    span.set_attributes({**more, **facts, **{name: value for name, value in known.items() if value is not None}})
    if "finish_reason" in exchange.facts:
        span.set_attribute("gen_ai.response.finish_reasons", str(exchange.facts["finish_reason"]).split(","))
    if exchange.failed:
        span.set_status(StatusCode.ERROR)
    span.end()


def note_tenant(tenant: str | None) -> None:
    """Its caller is known."""
    exchange = CURRENT.get()
    if exchange is not None:
        exchange.tenant = tenant


def note_model(asked: str) -> None:
    """What the client wants to answer; a name that could forge a line is not repeated."""
    exchange = CURRENT.get()
    if exchange is not None and _NAME.fullmatch(asked):
        exchange.model = redacted(asked)  # somebody may have sent a key by mistake
        if exchange.span is not None:
            exchange.span.set_attribute("gen_ai.request.model", exchange.model)


def note_problem(status: int, code: str | None) -> None:
    """The client is told of an error."""
    exchange = CURRENT.get()
    if exchange is not None:
        exchange.facts["error"] = code or str(status)
        exchange.failed = status >= 500


def note_call(call_id: str, target: Target, wanted: Sequence[GenerateRequest], log_prompts: bool) -> Origin | None:
    """A generation is about to begin. Returns what its requests say of where they come from."""
    exchange = CURRENT.get()
    if exchange is None:
        return None
    first = wanted[0]
    exchange.model, exchange.log_prompts = target.served_as, log_prompts
    exchange.adapter = first.adapter.digest if first.adapter is not None else None
    origin = Origin(exchange.request_id, log_prompts=log_prompts)
    if exchange.span is None:
        return origin
    params = first.params
    known: dict[str, Fact | None] = {
        "gen_ai.operation.name": "chat" if first.messages is not None else "text_completion",
        "gen_ai.provider.name": "slipstream",
        "gen_ai.request.stream": first.stream,
        "gen_ai.request.choice.count": len(wanted) * params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.id": call_id,
        "gen_ai.response.model": target.served_as,
    }
    exchange.span.set_attributes({name: value for name, value in known.items() if value is not None})
    return carried(origin, exchange.span)


def note_first_token() -> None:
    """The first step's tokens are here."""
    exchange = CURRENT.get()
    if exchange is not None:
        exchange.facts["first_token_seconds"] = round(perf_counter() - exchange.began, 6)
        if exchange.span is not None:
            exchange.span.add_event("first token")


def note_ending(ending: Ending, wanted: Sequence[GenerateRequest], answers: Sequence[str]) -> None:
    """A generation has ended. `answers`: what it said, where that is kept."""
    exchange = CURRENT.get()
    if exchange is None:
        return
    counts = ending.counts.model_dump(exclude={"requests"})
    exchange.facts |= {**counts, "decode_steps": ending.decode_steps}
    if ending.error is not None:
        exchange.facts.setdefault("error", type(ending.error).__name__)
    else:
        exchange.facts["finish_reason"] = ",".join(sorted(set(ending.reasons))) or "aborted"
    if exchange.log_prompts:
        _tell_texts(exchange, wanted, answers)


def _tell_texts(exchange: Exchange, wanted: Sequence[GenerateRequest], answers: Sequence[str]) -> None:
    """The one place where prompts and answers leave a request."""
    asked = [turn for request in wanted for turn in _turns(request)]
    prompt = redacted(shortened([f"{role}: {text}" if role else text for role, text in asked]))
    answer = redacted(shortened(answers))
    log.info("prompt and answer", extra={"prompt": prompt, "answer": answer})
    if exchange.span is not None:
        name = "gen_ai.client.inference.operation.details"
        exchange.span.add_event(name, {_INPUT: _message("user", prompt), _OUTPUT: _message("assistant", answer)})


def _message(role: str, text: str) -> str:
    """One message in the JSON form of OpenTelemetry's conventions."""
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}], ensure_ascii=False)


def _turns(request: GenerateRequest) -> Sequence[tuple[str, str]]:
    if request.messages is not None:
        return [(message.role, message.content) for message in request.messages]
    return [("", request.text if request.text is not None else f"token ids {list(request.token_ids or ())}")]
