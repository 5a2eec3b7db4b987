"""What both Redis twins (`RedisStore`, `RedisJobs`) do alike: connect, run commands and scripts, check the schema."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisClusterException, RedisError

from adapter_registry.errors import StoreUnavailable
from adapter_registry.migrations import SCHEMA, STEPS
from adapter_registry.scripts import SCHEMA_KEY, load_script

RESTORING = "restoring"  # instead of a schema's number: the data are not whole, and nobody may read them
_QUEUE_WAIT_S = 5.0  # for a free connection


def connect(url: str, *, timeout_s: float, retries: int, max_connections: int) -> Redis | RedisCluster:
    """A client of `redis://`, `rediss://` or `unix://`; of a cluster at `redis+cluster://` or `rediss+cluster://`; or of the
    master that sentinels name, at `redis+sentinel://user:password@sentinel:26379,other:26379/service/0`.

    The password is the master's; the sentinels' own, if they have one, is `?sentinel_password=`. Nothing is connected yet.
    Each attempt takes at most `timeout_s`, and there are `retries` more of them. Raises `ValueError` for what is no such URL.
    """
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), retries),
        "max_connections": max_connections + 8,  # the cluster client's own look at its nodes comes on top
        "protocol": 2,  # the scripts' answers are flat arrays; nothing here needs RESP3's handshake
    }
    scheme, _, rest = url.partition("://")
    if scheme.endswith("+cluster"):
        return RedisCluster.from_url(f"{scheme.removesuffix('+cluster')}://{rest}", **options)
    if scheme.endswith("+sentinel"):
        return _behind_sentinels(url, options)
    return Redis.from_url(url, **options)


class _SentinelRedis(Redis):
    """A client that closes its sentinels' connections as well."""

    sentinels: Sequence[Redis] = ()

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Give all connections back."""
        await super().aclose(close_connection_pool)
        for sentinel in self.sentinels:
            await sentinel.aclose()


def _behind_sentinels(url: str, options: dict[str, Any]) -> Redis:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    service, _, database = parts.path.strip("/").partition("/")
    pairs = [(host, port) for host, _, port in (each.rpartition(":") for each in hosts.split(","))]
    if not service or not all(host and port.isdigit() for host, port in pairs) or not (database or "0").isdigit():
        raise ValueError("Sentinels are named as redis+sentinel://:password@host:26379,other:26379/service/0.")
    tls: dict[str, Any] = {"ssl": True} if parts.scheme.startswith("rediss") else {}
    same = ("socket_timeout", "socket_connect_timeout", "decode_responses", "protocol")
    query = dict(parse_qsl(parts.query))
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]  # redis-py's own gap
        [(host.strip("[]"), int(port)) for host, port in pairs],
        sentinel_kwargs={
            **tls,
            **{name: options[name] for name in same},
            "password": query.get("sentinel_password"),
            "retry": Retry(NoBackoff(), 0),  # the next one is asked at once
        },
    )
    client = sentinel.master_for(
        service, redis_class=_SentinelRedis, **options, **tls, db=int(database or 0),
        username=unquote(user) or None, password=unquote(password) or None,
    )  # fmt: skip
    assert isinstance(client, _SentinelRedis)
    client.sentinels = sentinel.sentinels
    return client


class RedisConnection:
    """A client that may have at most `max_connections` commands under way; one instance serves one event loop."""

    SCRIPTS: ClassVar[Sequence[str]] = ()  # that it runs

    def __init__(self, client: Redis | RedisCluster, *, max_connections: int = 64) -> None:
        self._client = client
        self.failures = 0  # commands that were not answered
        # One command holds one connection. The cluster client refuses rather than waits when it runs out of them.
        self._connections = asyncio.Semaphore(max_connections)
        self._scripts = {name: client.register_script(load_script(name)) for name in self.SCRIPTS}
        self._schema_checked = False
        self._migrating = asyncio.Lock()

    @classmethod
    def from_url(
        cls, url: str, *, timeout_s: float = 2.0, retries: int = 2, max_connections: int = 64, **own: float
    ) -> Self:
        """One at any URL that `connect` takes: one server, a cluster, or behind sentinels. `own`: what the class's own
        constructor takes.

        Nothing is connected yet. Each attempt takes at most `timeout_s`, and there are `retries` more of them. Every
        write may safely run twice, which is what a retry after a lost answer does; but a delete whose first try went
        through then finds nothing and raises `NotPublished`.
        """
        client = connect(url, timeout_s=timeout_s, retries=retries, max_connections=max_connections)
        return cls(client, max_connections=max_connections, **own)

    async def ping(self) -> None:
        """Raises `StoreUnavailable` when the store does not answer."""
        await self._command("PING")

    async def close(self) -> None:
        """Give connections back."""
        await self._client.aclose()

    async def _script(self, name: str, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        """Run a script; redis-py sends its text again when the server has forgotten it."""
        async with self._answering():
            return await self._scripts[name](keys=keys, args=args)

    async def _command(self, *words: str) -> Any:
        """Run one command."""
        async with self._answering():
            return await self._client.execute_command(*words)

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        """The one place where Redis's errors become ours; the cause stays attached for the logs, not for clients."""
        try:
            async with asyncio.timeout(_QUEUE_WAIT_S):
                await self._connections.acquire()
            try:
                if not self._schema_checked:
                    await self._check_schema()
                yield
            finally:
                self._connections.release()
        except (NoPermissionError, AuthenticationError) as error:
            self.failures += 1
            raise StoreUnavailable(
                "Redis refuses this user a command, or the user itself: check SLIPSTREAM_REDIS_URL and the user's rights."
            ) from error
        except (RedisError, RedisClusterException, OSError) as error:
            self.failures += 1
            raise StoreUnavailable("The registry cannot be reached or did not answer in time; try again.") from error

    async def _check_schema(self) -> None:
        """Bring older data to our schema and refuse newer, before a single record of it is read or changed."""
        async with self._migrating:
            if self._schema_checked:
                return
            execute = self._client.execute_command
            await execute("SET", SCHEMA_KEY, str(SCHEMA), "NX")
            found = str(await execute("GET", SCHEMA_KEY))
            if found == RESTORING:
                raise StoreUnavailable(
                    "The registry is being restored from a backup, or that was broken off: run `slipstream registry restore` "
                    "to its end."
                )
            if not found.isdigit() or int(found) > SCHEMA:
                raise StoreUnavailable(
                    f"The registry's data has schema {found[:20]!r} and this Slipstream reads schema {SCHEMA}: "
                    "upgrade Slipstream to the version that wrote it."
                )
            for schema in range(int(found), SCHEMA):
                await STEPS[schema](execute)
                # Others may do the same at this moment, or have gone further already.
                await execute("EVAL", load_script("advance"), 1, SCHEMA_KEY, str(schema), str(schema + 1))
            self._schema_checked = True
