"""What one application keeps while it lives: its services and the little state that belongs to it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from adapter_registry.keys import KeyRecord
from adapter_registry.limits import MINUTE_S
from adapter_registry.records import Route
from slipstream.api.catalog import Catalog
from slipstream.api.key_uses import KeyUses
from slipstream.api.metering import Meter, MonthUse
from slipstream.api.recent import RecentAnswers
from slipstream.api.rollout import Outcomes, Shadows
from slipstream.api.services import ApiServices
from slipstream.metrics.gateway import GatewayMetrics

_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Runtime:
    """Built once by `create_app`, reached by the routes through `RuntimeDep`."""

    services: ApiServices
    metrics: GatewayMetrics
    catalog: Catalog
    keys: RecentAnswers[str, KeyRecord]
    meter: Meter
    month: MonthUse
    key_uses: KeyUses
    outcomes: Outcomes
    shadows: Shadows
    started_at: int = field(default_factory=lambda: int(time.time()))


def build_runtime(services: ApiServices, metrics: GatewayMetrics) -> Runtime:
    """Wire the caches to the services."""
    stale_s, clock = services.outage_cache_s, services.clock
    names: RecentAnswers[tuple[str, str], Route] = RecentAnswers(fresh_s=0.0, stale_s=stale_s, limit=_KEPT, clock=clock)
    keys: RecentAnswers[str, KeyRecord] = RecentAnswers(
        fresh_s=services.key_cache_s, stale_s=stale_s, limit=_KEPT, clock=clock
    )
    catalog = Catalog(services.engines, services.store, names, clock)
    longest_s = services.request_timeout_s + MINUTE_S
    meter = Meter(services.tenants, clock, longest_s=longest_s, rejected=metrics.rejected)
    month = MonthUse(services.tenants, clock)
    outcomes = Outcomes(services.store)
    shadows = Shadows(catalog, meter, outcomes, metrics, services.request_timeout_s)
    return Runtime(services, metrics, catalog, keys, meter, month, KeyUses(services.store, clock), outcomes, shadows)


async def _runtime_of(request: Request) -> Runtime:  # async: FastAPI runs others in threads, for each request
    runtime = request.app.state.runtime
    assert isinstance(runtime, Runtime)
    return runtime


RuntimeDep = Annotated[Runtime, Depends(_runtime_of)]
