"""Behind sentinels: the registry goes on when its master dies, on the replica that takes over."""

from __future__ import annotations

import asyncio
import time

import pytest
from support.drafts import draft, publish
from support.redis_server import running_sentinels

from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.backup.snapshot import take_snapshot
from adapter_registry.errors import StoreUnavailable
from adapter_registry.limits import Quota
from adapter_registry.records import parse_reference
from adapter_registry.redis_connection import connect
from adapter_registry.redis_store import RedisStore
from adapter_registry.redis_tenants import RedisTenants
from adapter_registry.tenants import TenantRecord

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]


async def test_a_failover_costs_seconds_and_loses_nothing_that_was_replicated() -> None:
    with running_sentinels() as sentinels:
        store, tenants = RedisStore.from_url(sentinels.url), RedisTenants.from_url(sentinels.url)
        data = RegistryData.from_url(sentinels.url)
        try:
            first = await publish(store, draft("a"))
            await tenants.put_tenant(TenantRecord(tenant="acme", quota=Quota(requests_per_minute=5)))
            await asyncio.sleep(1)  # replication is not waited for
            sentinels.servers[0].stop(kill=True)
            sentinels.processes[0].kill()  # with the first to be asked
            began = time.monotonic()
            while True:
                try:
                    second = await publish(store, draft("b"))
                    break
                except StoreUnavailable:
                    assert time.monotonic() - began < 60
                    await asyncio.sleep(0.2)
            assert (first.version, second.version) == (1, 2)
            assert await store.resolve("acme", parse_reference("sql@1")) == first
            assert (await tenants.admit("acme", "r", 1)).tenant.quota.requests_per_minute == 5
            snapshot = await take_snapshot(data, "acme", await data.keys())  # as a backup reads it
            assert set(snapshot.adapters["sql"]) == {1, 2}
        finally:
            await data.close()
            await store.close()
            await tenants.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://127.0.0.1:26379",
        "redis+sentinel://127.0.0.1/registry",
        "redis+sentinel://:pw@127.0.0.1:26379,other/registry/0",
        "redis+sentinel://127.0.0.1:26379/registry/x",
    ],
)
def test_what_is_no_sentinel_url_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis\+sentinel") as refused:
        connect(url, timeout_s=1, retries=0, max_connections=1)
    assert "pw@" not in str(refused.value)
