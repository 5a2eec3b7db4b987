"""What both Redis twins (`RedisStore`, `RedisJobs`) do alike: connect, run commands and scripts, check the schema."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisClusterException, RedisError

from adapter_registry.errors import StoreUnavailable
from adapter_registry.scripts import SCHEMA_KEY, load_script

SCHEMA = "1"
_QUEUE_WAIT_S = 5.0  # for a free connection


def connect(url: str, *, timeout_s: float, retries: int, max_connections: int) -> Redis | RedisCluster:
    """A client of `redis://`, `rediss://`, `unix://`, or of a cluster at `redis+cluster://` or `rediss+cluster://`.

    Nothing is connected yet. Each attempt takes at most `timeout_s`, and there are `retries` more of them.
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
    return Redis.from_url(url, **options)


class RedisConnection:
    """A client that may have at most `max_connections` commands under way; one instance serves one event loop."""

    def __init__(self, client: Redis | RedisCluster, scripts: Sequence[str], max_connections: int) -> None:
        self._client = client
        # One command holds one connection. The cluster client refuses rather than waits when it runs out of them.
        self._connections = asyncio.Semaphore(max_connections)
        self._scripts = {name: client.register_script(load_script(name)) for name in scripts}
        self._schema_checked = False

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
        except (RedisError, RedisClusterException, OSError) as error:
            raise StoreUnavailable("The registry cannot be reached or did not answer in time; try again.") from error

    async def _check_schema(self) -> None:
        """Refuse data that another schema wrote, before a single record of it is read or changed."""
        await self._client.execute_command("SET", SCHEMA_KEY, SCHEMA, "NX")
        found = str(await self._client.execute_command("GET", SCHEMA_KEY))
        if found != SCHEMA:
            raise StoreUnavailable(
                f"The registry's data has schema {found[:20]!r} and this Slipstream reads schema {SCHEMA}: "
                "upgrade Slipstream to the version that wrote it."
            )
        self._schema_checked = True
