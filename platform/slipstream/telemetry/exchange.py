"""What is known of the request that this code runs for: logs and spans say it, so nobody has to pass it along."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Fact = str | int | float


@dataclass(slots=True)
class Exchange:
    """One request. Whoever learns something about it writes it down here; every log line of the request shows it."""

    request_id: str  # the HTTP request's, `x-request-id`
    tenant: str | None = None
    model: str | None = None  # what answers: a base model, or `name@version`
    adapter: str | None = None  # digest
    span: Span | None = None  # None = tracing is off
    trace_id: str | None = None  # 32 hex digits
    log_prompts: bool = False  # its tenant has it switched on
    failed: bool = False  # by our own fault
    facts: dict[str, Fact] = field(default_factory=dict)  # for the access line: tokens, steps, how it ended
    began: float = field(default_factory=perf_counter)

    def context(self) -> dict[str, str]:
        """What every log line of the request carries."""
        known = {
            "request_id": self.request_id,
            "tenant": self.tenant,
            "model": self.model,
            "adapter": self.adapter,
            "trace_id": self.trace_id,
        }
        return {name: value for name, value in known.items() if value is not None}


CURRENT: ContextVar[Exchange | None] = ContextVar("slipstream_exchange", default=None)
