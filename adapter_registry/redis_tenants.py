"""`RedisTenants`: tenants' settings, rates and usage in Redis, the same for all gateways."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from functools import lru_cache

from redis.asyncio import Redis, RedisCluster

from adapter_registry.limits import Exceeded, Verdict
from adapter_registry.records import check_name, utc_now
from adapter_registry.redis_connection import RedisConnection
from adapter_registry.scripts import PREFIX, TENANTS_KEY, TenantKeys
from adapter_registry.store import AUDIT_KEPT
from adapter_registry.tenants import (
    LEASE_S,
    SETTLED_KEPT,
    Admission,
    Settlement,
    TenantRecord,
    TenantStore,
    UsageCounts,
    UsageRow,
    months,
)

TENANT_SCRIPTS = ("put_tenant", "admit", "settle", "renew")
USAGE_KEPT_S = 400 * 86_400  # a year and a month


class _Keys(TenantKeys):
    """A tenant's keys, with those of its settings and counters."""

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        base = f"{PREFIX}{{{check_name(tenant, 'tenant')}}}:"
        self.rates = base + "rates"  # hash: requests, tokens = what is left of a minute's; …:at = ms when that was so
        self.active = base + "running"  # zset: running request -> ms when its lease ends
        self.settled = base + "settled"  # zset: request -> ms
        self._usage = base + "usage:"

    def usage(self, month: str) -> str:
        """Hash: `day|counter|model` -> number; `total` = tokens of the month."""
        return self._usage + month


class RedisTenants(RedisConnection, TenantStore):
    """Build it with `from_url`; one instance serves one event loop."""

    SCRIPTS = TENANT_SCRIPTS

    def __init__(self, client: Redis | RedisCluster, *, max_connections: int = 64, lease_s: float = LEASE_S) -> None:
        super().__init__(client, max_connections=max_connections)
        self._lease_ms = round(lease_s * 1000)

    async def put_tenant(self, record: TenantRecord, by: str = "") -> None:
        """Keep a tenant's settings; they hold from its next request on."""
        await self._command("SADD", TENANTS_KEY, record.tenant)
        keys = _Keys(record.tenant)
        args: list[str | int] = [record.stored(), record.tenant, by, AUDIT_KEPT]
        await self._script("put_tenant", [keys.settings, keys.audit], args)

    async def get_tenant(self, tenant: str) -> TenantRecord:
        """Its settings; the defaults if it has none of its own."""
        return _record(tenant, await self._command("GET", _Keys(tenant).settings) or "")

    async def admit(self, tenant: str, request_id: str, tokens: int) -> Admission:
        """Charge a request, and `tokens` that it may need; one round trip. Raises `StoreUnavailable`."""
        keys = _Keys(tenant)
        month = keys.usage(f"{utc_now():%Y-%m}")
        exceeded, wait_ms, stored, requests, left = await self._script(
            "admit", [keys.settings, keys.rates, keys.active, month], [request_id, tokens, self._lease_ms]
        )
        verdict = Verdict(
            Exceeded(exceeded) if exceeded else None,
            int(wait_ms) / 1000,
            float(requests) if requests else None,
            float(left) if left else None,
        )
        return Admission(verdict, _record(tenant, stored))

    async def renew(self, tenant: str, request_ids: Iterable[str]) -> None:
        """These still run: their leases last another `LEASE_S`."""
        await self._script("renew", [_Keys(tenant).active], [self._lease_ms, *request_ids])

    async def settle(self, settlement: Settlement) -> bool:
        """Count what a request used and correct its charge; False when that was done before."""
        keys, counts = _Keys(settlement.tenant), settlement.counts
        counters = [
            word
            for name in UsageCounts.model_fields
            for word in (f"{settlement.day}|{name}|{settlement.model}", getattr(counts, name))
        ]
        done = await self._script(
            "settle",
            [keys.settings, keys.rates, keys.active, keys.settled, keys.usage(f"{settlement.day:%Y-%m}")],
            [settlement.request_id, SETTLED_KEPT, USAGE_KEPT_S, settlement.reserved, counts.tokens, *counters],
        )
        return bool(done)

    async def usage(self, tenant: str, first: date, last: date) -> Sequence[UsageRow]:
        """By day and model, both days included."""
        keys, found = _Keys(tenant), defaultdict[tuple[date, str], dict[str, int]](dict)
        for month in months(first, last):
            for name, number in (await self._command("HGETALL", keys.usage(month))).items():
                day, _, rest = name.partition("|")
                counter, _, model = rest.partition("|")
                if counter and first <= date.fromisoformat(day) <= last:
                    found[date.fromisoformat(day), model][counter] = int(number)
        return [UsageRow(day=day, model=model, counts=UsageCounts(**n)) for (day, model), n in sorted(found.items())]


@lru_cache(maxsize=4096)
def _record(tenant: str, stored: str) -> TenantRecord:
    return TenantRecord.model_validate_json(stored) if stored else TenantRecord(tenant=tenant)
