"""`MemoryTenants`: the registry's `TenantStore` without Redis. It passes the same contract tests as `RedisTenants`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date

from adapter_registry.limits import TenantLimits
from adapter_registry.records import AuditAction, check_name, utc_now
from adapter_registry.tenants import (
    LEASE_S,
    SETTLED_KEPT,
    Admission,
    Settlement,
    TenantRecord,
    TenantStore,
    UsageCounts,
    UsageRow,
)
from slipstream.testing.memory_store import MemoryStore


@dataclass
class _Tenant:
    record: TenantRecord
    limits: TenantLimits
    settled: deque[str] = field(default_factory=lambda: deque(maxlen=SETTLED_KEPT))
    usage: dict[tuple[date, str], UsageCounts] = field(default_factory=dict)

    def month_tokens(self, today: date) -> int:
        this = (today.year, today.month)
        return sum(counts.tokens for (day, _), counts in self.usage.items() if (day.year, day.month) == this)


class MemoryTenants(TenantStore):
    """Records and counters in dictionaries."""

    def __init__(
        self, store: MemoryStore, *, clock: Callable[[], float] = time.monotonic, lease_s: float = LEASE_S
    ) -> None:
        self._store = store
        self._clock = clock
        self._lease_s = lease_s
        self._tenants: dict[str, _Tenant] = {}

    async def put_tenant(self, record: TenantRecord, by: str = "") -> None:
        """Keep a tenant's settings; they hold from its next request on."""
        detail = record.stored()
        self._store.write_down(record.tenant, by, AuditAction.TENANT_CHANGED, record.tenant, detail)
        self._of(record.tenant).record = record
        self._store.enter(record.tenant).storage_bytes = record.quota.storage_bytes

    async def get_tenant(self, tenant: str) -> TenantRecord:
        """Its settings; the defaults if it has none of its own."""
        return self._of(tenant).record

    async def admit(self, tenant: str, request_id: str, tokens: int) -> Admission:
        """Charge a request, and `tokens` that it may need."""
        mine = self._of(tenant)
        used = mine.month_tokens(utc_now().date())
        verdict = mine.limits.admit(mine.record.quota, request_id, tokens, used, self._clock())
        return Admission(verdict, mine.record)

    async def renew(self, tenant: str, request_ids: Iterable[str]) -> None:
        """These still run: their leases last another `LEASE_S`."""
        for request_id in request_ids:
            self._of(tenant).limits.renew(request_id, self._clock())

    async def settle(self, settlement: Settlement) -> bool:
        """Count what a request used and correct its charge; False when that was done before."""
        mine, counts = self._of(settlement.tenant), settlement.counts
        if settlement.request_id in mine.settled:
            return False
        mine.settled.append(settlement.request_id)
        mine.limits.release(mine.record.quota, settlement.request_id, settlement.reserved, counts.tokens, self._clock())
        key = (settlement.day, settlement.model)
        mine.usage[key] = mine.usage.get(key, UsageCounts()).plus(counts)
        return True

    async def usage(self, tenant: str, first: date, last: date) -> Sequence[UsageRow]:
        """By day and model, both days included."""
        found = sorted(self._of(tenant).usage.items(), key=lambda item: item[0])
        return [UsageRow(day=day, model=model, counts=counts) for (day, model), counts in found if first <= day <= last]

    async def close(self) -> None:
        """Nothing to give back."""

    def _of(self, tenant: str) -> _Tenant:
        if tenant not in self._tenants:
            record = TenantRecord(tenant=check_name(tenant, "tenant"))
            self._tenants[tenant] = _Tenant(record, TenantLimits(self._lease_s))
        return self._tenants[tenant]
