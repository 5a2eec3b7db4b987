"""Quotas and usage at the gateway: a request is charged before it runs, and counted when it has ended, however it ended.

While the store is away, quotas go on here from what was last known of them, each gateway for itself, and usage waits in
memory until it can be counted.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from adapter_registry.errors import StoreUnavailable
from adapter_registry.limits import Exceeded, Quota, TenantLimits, Verdict
from adapter_registry.records import utc_now
from adapter_registry.tenants import Admission, Settlement, TenantRecord, TenantStore, UsageCounts
from slipstream.errors import QuotaExceeded

log = logging.getLogger("slipstream.api")

MAX_UNSETTLED = 100_000  # requests whose usage waits for the store; beyond, the oldest is lost, and said to be
RETRY_S = 1.0  # how long a store that was away is left alone
CHARS_PER_TOKEN = 4  # of prompts that nobody has tokenised yet
UNKNOWN_ANSWER = 256  # tokens that an answer without a limit is charged for until its length is known
MONTH_FRESH_S = 60.0
MAX_TENANTS = 4096  # whose quotas are remembered
_HINTS = {
    Exceeded.REQUESTS: "Its quota is {limit} requests a minute.",
    Exceeded.TOKENS: "Its quota is {limit} tokens a minute, and this request may need {tokens}.",
    Exceeded.CONCURRENT: "Its quota is {limit} requests at once: wait for one to end.",
    Exceeded.MONTH: "Its {limit} tokens of this month are used up.",
}


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that may run."""

    request_id: str
    tenant: str
    model: str
    reserved: int  # tokens it was charged for in the store
    estimated: int  # tokens it may need at most
    weight: float
    headers: Mapping[str, str]  # OpenAI's, about what is left
    log_prompts: bool
    since: float  # by the gateway's clock


@dataclass(slots=True)
class _Known:
    """What this gateway last heard of a tenant, and how it limits it when it must do so alone."""

    record: TenantRecord
    limits: TenantLimits


class Meter:
    """Owned by one application; `keep_counting` runs beside its requests, and `renew` now and then."""

    def __init__(
        self,
        store: TenantStore,
        clock: Callable[[], float],
        max_unsettled: int = MAX_UNSETTLED,
        longest_s: float = math.inf,
        rejected: Callable[[str, str], None] = lambda tenant, exceeded: None,
    ) -> None:
        """`longest_s`: no request runs longer; one that seems to is not renewed. `rejected` is told of each refusal."""
        self._store = store
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._open: dict[str, Ticket] = {}
        self._unsettled: deque[Settlement] = deque()
        self._max_unsettled = max_unsettled
        self._longest_s = longest_s
        self._rejected = rejected
        self._wake = asyncio.Event()
        self._away_until = -math.inf
        self.lost = 0  # requests whose usage could not be kept

    @property
    def unsettled(self) -> int:
        """Requests whose usage is not yet in the store."""
        return len(self._unsettled)

    def known(self, tenant: str) -> tuple[Quota, Mapping[Exceeded, float]] | None:
        """The quota of a tenant that was here lately, and the shares of its minute's allowances that are used."""
        known = self._known.get(tenant)
        if known is None:
            return None
        quota = known.record.quota
        return quota, known.limits.shares_used(quota, self._clock())

    async def admit(self, request_id: str, tenant: str, model: str, tokens: int) -> Ticket:
        """Charge a request for up to `tokens`. Raises `QuotaExceeded`."""
        admission = await self._ask(request_id, tenant, tokens)
        charged = tokens
        if admission is None:
            admission = self._admit_alone(request_id, tenant, tokens)
            charged = 0  # there; here it is all of them
        quota = admission.tenant.quota
        headers = rate_headers(quota, admission.verdict)
        if admission.verdict.exceeded is not None:
            self._rejected(tenant, admission.verdict.exceeded)
            raise _refusal(admission, tokens, headers)
        record = admission.tenant
        ticket = Ticket(
            request_id, tenant, model, charged, tokens, record.weight, headers, record.log_prompts, self._clock()
        )
        self._open[request_id] = ticket
        return ticket

    def settle(self, ticket: Ticket, counts: UsageCounts) -> None:
        """The request has ended; the second time this is called for it nothing happens."""
        if self._open.pop(ticket.request_id, None) is None:
            return
        known = self._known.get(ticket.tenant)
        if known is not None:
            # Of what the store admitted, the bucket here is what the store said was left: charged there, and so here.
            known.limits.release(known.record.quota, ticket.request_id, ticket.estimated, counts.tokens, self._clock())
        self._keep(
            Settlement(
                request_id=ticket.request_id, tenant=ticket.tenant, day=utc_now().date(), model=ticket.model,
                reserved=ticket.reserved, counts=counts,
            )
        )  # fmt: skip

    def count(self, request_id: str, tenant: str, model: str, counts: UsageCounts) -> None:
        """Count what was used without having been admitted; it is charged now."""
        day = utc_now().date()
        self._keep(Settlement(request_id=request_id, tenant=tenant, day=day, model=model, reserved=0, counts=counts))

    def _keep(self, settlement: Settlement) -> None:
        if len(self._unsettled) >= self._max_unsettled:
            dropped = self._unsettled.popleft()
            self.lost += 1
            log.error("usage of request %s of tenant %s is lost: too much waits", dropped.request_id, dropped.tenant)
        self._unsettled.append(settlement)
        self._wake.set()

    async def keep_counting(self) -> None:
        """Bring usage to the store as it comes; ends when it is cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                done = await self.flush()
            except Exception:  # a loop's top: whatever it is, usage must go on being counted
                log.exception("counting usage failed")
                done = False
            if not done:
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def flush(self) -> bool:
        """Bring what has ended to the store, oldest first; whether all of it is there."""
        while self._unsettled:
            oldest = self._unsettled[0]
            try:
                await self._store.settle(oldest)
            except StoreUnavailable:
                self._away_until = self._clock() + RETRY_S
                return False
            if self._unsettled and self._unsettled[0] is oldest:
                self._unsettled.popleft()
        return True

    async def renew(self) -> None:
        """Once."""
        now, by_tenant = self._clock(), dict[str, list[str]]()
        for ticket in self._open.values():
            if now - ticket.since < self._longest_s:
                by_tenant.setdefault(ticket.tenant, []).append(ticket.request_id)
        for tenant, ids in by_tenant.items():
            if tenant in self._known:
                for request_id in ids:
                    self._known[tenant].limits.renew(request_id, now)
            try:
                await self._store.renew(tenant, ids)
            except StoreUnavailable:
                continue

    async def _ask(self, request_id: str, tenant: str, tokens: int) -> Admission | None:
        """The store's answer; None while it is away. It is left alone for a moment after it did not answer."""
        if self._clock() < self._away_until:
            return None
        try:
            admission = await self._store.admit(tenant, request_id, tokens)
        except StoreUnavailable:
            self._away_until = self._clock() + RETRY_S
            return None
        self._remember(admission)
        return admission

    def _remember(self, admission: Admission) -> None:
        record = admission.tenant
        known = self._known.pop(record.tenant, None) or _Known(record, TenantLimits())
        known.record = record
        known.limits.follow(record.quota, admission.verdict, self._clock())
        self._known[record.tenant] = known  # the last to be forgotten
        if len(self._known) > MAX_TENANTS:
            del self._known[next(iter(self._known))]

    def _admit_alone(self, request_id: str, tenant: str, tokens: int) -> Admission:
        """By the quota that was last known; nothing is known of this month's tokens."""
        known = self._known.get(tenant)
        if known is None:
            return Admission(Verdict(), TenantRecord(tenant=tenant))
        verdict = known.limits.admit(known.record.quota, request_id, tokens, 0, self._clock())
        return Admission(verdict, known.record)


class MonthUse:
    """Tokens that tenants have used this month, asked for now and then, for those who watch."""

    def __init__(self, store: TenantStore, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self._kept: dict[str, tuple[float, int]] = {}

    async def tokens(self, tenant: str, *, ask: bool) -> int | None:
        """As of the last minute; with `ask` false, of the last time. None while nobody knows."""
        kept, now = self._kept.get(tenant), self._clock()
        if not ask or (kept is not None and now - kept[0] < MONTH_FRESH_S):
            return None if kept is None else kept[1]
        today = utc_now().date()
        try:
            rows = await self._store.usage(tenant, today.replace(day=1), today)
        except StoreUnavailable:
            return None if kept is None else kept[1]
        self._kept.pop(tenant, None)
        self._kept[tenant] = (now, sum(row.counts.tokens for row in rows))
        if len(self._kept) > MAX_TENANTS:
            del self._kept[next(iter(self._kept))]
        return self._kept[tenant][1]


def needed_tokens(prompts: Iterable[str | tuple[int, ...]], answers: int, max_tokens: int | None) -> int:
    """What a request may need at most, before anybody has tokenised it."""
    prompt = sum(len(p) if isinstance(p, tuple) else -(-len(p.encode()) // CHARS_PER_TOKEN) for p in prompts)
    return prompt + answers * (UNKNOWN_ANSWER if max_tokens is None else max_tokens)


def rate_headers(quota: Quota, verdict: Verdict) -> dict[str, str]:
    """`x-ratelimit-…` as OpenAI's clients know them, for the limits that there are."""
    found: dict[str, str] = {}
    for name, limit, left in (
        ("requests", quota.requests_per_minute, verdict.requests_left),
        ("tokens", quota.tokens_per_minute, verdict.tokens_left),
    ):
        if limit is not None and left is not None:
            found[f"x-ratelimit-limit-{name}"] = str(limit)
            found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left)))
            found[f"x-ratelimit-reset-{name}"] = f"{max(0.0, limit - left) * 60 / limit:.3f}s"
    return found


def _refusal(admission: Admission, tokens: int, headers: Mapping[str, str]) -> QuotaExceeded:
    exceeded = admission.verdict.exceeded
    assert exceeded is not None
    limit = getattr(admission.tenant.quota, exceeded)
    wait_s = max(1, math.ceil(admission.verdict.retry_after_s))
    if exceeded is Exceeded.MONTH:
        now = utc_now()
        first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        following = first.replace(year=now.year + now.month // 12, month=now.month % 12 + 1)
        wait_s = math.ceil((following - now).total_seconds())
    hint = _HINTS[exceeded].format(limit=limit, tokens=tokens)
    return QuotaExceeded(
        f"The tenant '{admission.tenant.tenant}' has used up its quota. {hint}",
        code="insufficient_quota" if exceeded is Exceeded.MONTH else "rate_limit_exceeded",
        retry_after_s=wait_s,
        headers=dict(headers),
    )
