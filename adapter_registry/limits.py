"""What a tenant may use, and the arithmetic of it: token buckets a minute, requests at once, tokens a month.

`lua/admit.lua` does the same in Redis for all gateways together; `TenantLimits` does it here, for tests and for a gateway
that cannot reach Redis. One contract suite holds them to each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from adapter_registry.records import Frozen

MINUTE_S = 60.0
Limit = Annotated[int, Field(ge=1, le=10**15)]


class Quota(Frozen):
    """What a tenant may use; None = as much as there is. Tokens are those of prompts and answers together."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    tokens_per_month: Limit | None = None  # by the calendar, in UTC
    storage_bytes: Limit | None = None  # of adapters and training files; equal content counts once


class Exceeded(StrEnum):
    """Which part of a quota is used up."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    CONCURRENT = "concurrent_requests"
    MONTH = "tokens_per_month"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request may run. requests_left, tokens_left: of this minute's, after it; None = without limit."""

    exceeded: Exceeded | None = None
    retry_after_s: float = 0.0  # 0 where only others' requests, or a new month, can help
    requests_left: float | None = None
    tokens_left: float | None = None


@dataclass(slots=True)
class Bucket:
    """A minute's allowance that fills up evenly. What was estimated too low may leave it below zero."""

    capacity: int
    left: float
    at: float  # seconds

    def refill(self, now: float) -> None:
        """To this moment."""
        self.left = min(float(self.capacity), self.left + (now - self.at) * self.capacity / MINUTE_S)
        self.at = now

    def wait_s(self, amount: float) -> float:
        """Until `amount` is there."""
        return max(0.0, (amount - self.left) * MINUTE_S / self.capacity)


@dataclass(slots=True)
class TenantLimits:
    """One tenant's use of its quota."""

    lease_s: float = 60.0
    active: dict[str, float] = field(default_factory=dict)  # request -> when its lease ends
    _buckets: dict[Exceeded, Bucket] = field(default_factory=dict)

    def admit(self, quota: Quota, request_id: str, tokens: int, month_tokens: int, now: float) -> Verdict:
        """Charge a request and the tokens that it will need at most, or refuse it and charge nothing."""
        self.active = {name: until for name, until in self.active.items() if until > now}
        requests = self._bucket(Exceeded.REQUESTS, quota.requests_per_minute, now)
        bucket = self._bucket(Exceeded.TOKENS, quota.tokens_per_minute, now)
        # A request larger than a whole minute's allowance waits for a full bucket, not forever.
        need = min(tokens, bucket.capacity) if bucket is not None else 0
        if request_id in self.active:  # asked again because the answer was lost
            return _verdict(None, 0.0, requests, bucket)
        if quota.tokens_per_month is not None and month_tokens >= quota.tokens_per_month:
            return _verdict(Exceeded.MONTH, 0.0, requests, bucket)
        if quota.concurrent_requests is not None and len(self.active) >= quota.concurrent_requests:
            return _verdict(Exceeded.CONCURRENT, 0.0, requests, bucket)
        if requests is not None and requests.left < 1:
            return _verdict(Exceeded.REQUESTS, requests.wait_s(1), requests, bucket)
        if bucket is not None and bucket.left < need:
            return _verdict(Exceeded.TOKENS, bucket.wait_s(need), requests, bucket)
        if requests is not None:
            requests.left -= 1
        if bucket is not None:
            bucket.left -= need
        self.active[request_id] = now + self.lease_s
        return _verdict(None, 0.0, requests, bucket)

    def follow(self, quota: Quota, verdict: Verdict, now: float) -> None:
        """What another keeper of the same limits has just said is left."""
        for kind, capacity, left in (
            (Exceeded.REQUESTS, quota.requests_per_minute, verdict.requests_left),
            (Exceeded.TOKENS, quota.tokens_per_minute, verdict.tokens_left),
        ):
            bucket = self._bucket(kind, capacity, now)
            if bucket is not None and left is not None:
                bucket.left = left

    def shares_used(self, quota: Quota, now: float) -> dict[Exceeded, float]:
        """Of the minute's allowances that there are: 0 = nothing yet, 1 = all, more = charged too little before."""
        found = {}
        for kind, capacity in (
            (Exceeded.REQUESTS, quota.requests_per_minute),
            (Exceeded.TOKENS, quota.tokens_per_minute),
        ):
            bucket = self._bucket(kind, capacity, now)
            if bucket is not None:
                found[kind] = 1.0 - bucket.left / bucket.capacity
        return found

    def renew(self, request_id: str, now: float) -> None:
        """It still runs."""
        if request_id in self.active:
            self.active[request_id] = now + self.lease_s

    def release(self, quota: Quota, request_id: str, reserved: int, used: int, now: float) -> None:
        """It has ended, and used other tokens than it was charged for."""
        self.active.pop(request_id, None)
        bucket = self._bucket(Exceeded.TOKENS, quota.tokens_per_minute, now)
        if bucket is not None:
            bucket.left = min(float(bucket.capacity), bucket.left + min(reserved, bucket.capacity) - used)

    def _bucket(self, kind: Exceeded, capacity: int | None, now: float) -> Bucket | None:
        if capacity is None:
            self._buckets.pop(kind, None)
            return None
        bucket = self._buckets.setdefault(kind, Bucket(capacity, float(capacity), now))
        bucket.capacity = capacity
        bucket.refill(now)
        return bucket


def _verdict(exceeded: Exceeded | None, wait_s: float, requests: Bucket | None, tokens: Bucket | None) -> Verdict:
    return Verdict(
        exceeded, wait_s, requests.left if requests is not None else None, tokens.left if tokens is not None else None
    )
