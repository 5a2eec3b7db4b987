"""Tenants, what they may use and what they have used: records, and the seam `TenantStore`.

Real twin: `adapter_registry.redis_tenants.RedisTenants`. Public fake: `slipstream.testing.MemoryTenants`. Both run the same
suite in `tests/contract`.

A request is admitted before it runs (`admit`, which charges what it may need) and settled when it has ended (`settle`, which
corrects the charge and counts what was used). Both may safely be asked twice: a request has an id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Protocol

from pydantic import Field

from adapter_registry.limits import Quota, Verdict
from adapter_registry.records import Frozen, Name, utc_now

LEASE_S = 60.0  # a running request whose gateway is silent for so long no longer counts as running
SETTLED_KEPT = 10_000  # ids of a tenant's last settled requests: what is settled twice is counted once
Count = Annotated[int, Field(ge=0)]


class TenantRecord(Frozen):
    """A tenant's settings; one that was never set has the defaults."""

    tenant: Name
    quota: Quota = Quota()
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0  # its share of a busy engine, against others'
    log_prompts: bool = False  # whether its prompts and answers go into logs and traces
    changed_at: datetime = Field(default_factory=utc_now)

    def stored(self) -> str:
        """As JSON. A switch that is off is left out: gateways of before it read what they know and nothing else."""
        return self.model_dump_json(exclude_none=True, exclude=None if self.log_prompts else {"log_prompts"})


class UsageCounts(Frozen):
    """What was used."""

    requests: Count = 0
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    drafted_tokens: Count = 0
    accepted_tokens: Count = 0

    @property
    def tokens(self) -> int:
        """What quotas count."""
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: UsageCounts) -> UsageCounts:
        """Both together."""
        return UsageCounts(**{name: getattr(self, name) + getattr(other, name) for name in UsageCounts.model_fields})


class Settlement(Frozen):
    """A request that has ended."""

    request_id: str
    tenant: Name
    day: date  # on which it ended, in UTC
    model: str  # what answered: `name@version` or a base model
    reserved: Count  # tokens that it was charged for when it was admitted
    counts: UsageCounts


class UsageRow(Frozen):
    """What a tenant used of a model on a day."""

    day: date
    model: str
    counts: UsageCounts


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to a request that wants to run."""

    verdict: Verdict
    tenant: TenantRecord


class TenantStore(Protocol):
    """Tenants' records and counters."""

    async def put_tenant(self, record: TenantRecord, by: str = "") -> None:
        """Keep a tenant's settings; they hold from its next request on."""
        ...

    async def get_tenant(self, tenant: str) -> TenantRecord:
        """Its settings; the defaults if it has none of its own."""
        ...

    async def admit(self, tenant: str, request_id: str, tokens: int) -> Admission:
        """Charge a request, and `tokens` that it may need; one round trip. Raises `StoreUnavailable`."""
        ...

    async def renew(self, tenant: str, request_ids: Iterable[str]) -> None:
        """These still run: their leases last another `LEASE_S`."""
        ...

    async def settle(self, settlement: Settlement) -> bool:
        """Count what a request used and correct its charge; False when that was done before."""
        ...

    async def usage(self, tenant: str, first: date, last: date) -> Sequence[UsageRow]:
        """By day and model, both days included."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


def months(first: date, last: date) -> Sequence[str]:
    """`2026-11` for each month that has one of the days."""
    found, year, month = [], first.year, first.month
    while (year, month) <= (last.year, last.month):
        found.append(f"{year}-{month:02}")
        year, month = (year, month + 1) if month < 12 else (year + 1, 1)
    return found
