"""What a gateway answers to a scrape: its own page, and everybody's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from prometheus_client.core import Metric

from adapter_registry.errors import RegistryError
from adapter_registry.limits import Exceeded
from slipstream.api.runtime import Runtime
from slipstream.errors import SlipstreamError
from slipstream.metrics.cluster import cluster_families
from slipstream.metrics.gateway import Surroundings
from slipstream.metrics.pages import Gathered, Page, Process, render

T = TypeVar("T")


async def own_page(runtime: Runtime) -> Page:
    """What this process counts. Takes less than a probe may, whatever the registry does: who asks waits no longer."""
    services, meter = runtime.services, runtime.meter
    up = await _within(_answers(services.store.ping()), services.probe_timeout_s / 2)
    quotas = await _within(_quotas(runtime, ask=up is True), services.probe_timeout_s / 4)
    around = Surroundings(
        registry_up=up is True,
        registry_errors=services.registry_failures(),
        unsettled=meter.unsettled,
        lost=meter.lost,
        quotas=quotas or (),
    )
    return runtime.metrics.page(Process(services.peers.own_name), around)


class Scrapes:
    """One look at everybody at a time: the port is the tenants' own, and a look asks every process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._under_way: dict[bool, asyncio.Task[bytes]] = {}  # by `names`

    async def page(self, *, names: bool) -> bytes:
        """The text for Prometheus; `names`: with what names tenants and adapters. Who comes during a look shares it."""
        task = self._under_way.get(names)
        if task is None:
            task = self._under_way[names] = asyncio.create_task(_everybodys_page(self._runtime, names=names))
            task.add_done_callback(lambda _: self._under_way.pop(names))
        return await asyncio.shield(task)


async def _everybodys_page(runtime: Runtime, *, names: bool) -> bytes:
    timeout_s = runtime.services.probe_timeout_s
    own, gathered, families = await asyncio.gather(
        own_page(runtime), _within(runtime.services.peers.gather(timeout_s), timeout_s + 0.5), _cluster(runtime)
    )
    others = gathered or Gathered()
    # In a thread: hundreds of lines for each process, while others wait for their tokens.
    return await asyncio.to_thread(render, (own, *others.pages), others.silent, families, names=names)


async def _cluster(runtime: Runtime) -> list[Metric]:
    views = await _within(runtime.services.cluster.view(), runtime.services.probe_timeout_s)
    return list(cluster_families(views)) if views is not None else []


async def _answers(part: Awaitable[object]) -> bool:
    await part
    return True


async def _within(part: Awaitable[T], timeout_s: float) -> T | None:
    try:
        return await asyncio.wait_for(part, timeout_s)
    except (TimeoutError, SlipstreamError, RegistryError):
        return None


async def _quotas(runtime: Runtime, *, ask: bool) -> list[tuple[str, str, float]]:
    """How much of their quotas the busiest tenants have used. The month's use is in the registry alone."""
    found: list[tuple[str, str, float]] = []
    for tenant in runtime.metrics.tenants():
        known = runtime.meter.known(tenant)
        if known is None:
            continue
        quota, shares = known
        found += [(tenant, limit.value, share) for limit, share in shares.items()]
        if quota.tokens_per_month is not None:
            used = await runtime.month.tokens(tenant, ask=ask)
            if used is not None:
                found.append((tenant, Exceeded.MONTH.value, used / quota.tokens_per_month))
    return found
