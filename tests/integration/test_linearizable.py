"""Many clients at once on one adapter: what each saw is what one after the other would have seen.

Each operation has a beginning and an end by one clock. An alias's log says in which order it moved; the check is that this
order is one in which every operation could have happened at a single moment between its beginning and its end.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support.drafts import draft
from support.redis_server import RedisServer, running_redis

from adapter_registry.errors import NotPublished
from adapter_registry.records import AliasMove, parse_reference
from adapter_registry.redis_store import RedisStore

pytestmark = [pytest.mark.redis]
PROD = parse_reference("sql@prod")
SECONDS = float(os.environ.get("SLIPSTREAM_HISTORY_SECONDS", "3"))


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running_redis() as found:
        yield found


@dataclass(frozen=True)
class Op:
    """What a client did, and what came of it."""

    kind: str
    id: str
    began: float
    ended: float
    value: Any  # written, read or given; None = there was nothing


async def timed(kind: str, id_: str, work: Callable[[], Awaitable[Any]]) -> Op:
    began = time.monotonic()
    try:
        value = await work()
    except NotPublished:
        value = None
    return Op(kind, id_, began, time.monotonic(), value)


class Client:
    """Does one thing after the other, at random."""

    def __init__(self, number: int, store: RedisStore, seed: int, until: float) -> None:
        self.number, self.store, self.until = number, store, until
        self.rng = random.Random(f"{seed}-{number}")
        self.history: list[Op] = []
        self.fresh = 0

    async def run(self) -> list[Op]:
        """Until the time is over."""
        count = 0
        while time.monotonic() < self.until:
            count += 1
            id_ = f"op-{self.number}-{count}"
            kind = self.rng.choices(["read", "write", "publish"], [6, 3, 2])[0]
            if kind == "write":  # a version of its own: what is read then says which write was seen
                self.fresh = (await self._published(f"of {id_}"))[1]
            self.history.append(await timed(kind, id_, lambda kind=kind, id_=id_: getattr(self, kind)(id_)))  # type: ignore[misc]
        return self.history

    async def read(self, id_: str) -> int:
        return (await self.store.resolve("acme", PROD)).version

    async def write(self, id_: str) -> int:
        await self.store.set_alias("acme", "sql", "prod", self.fresh, id_)
        return self.fresh

    async def publish(self, id_: str) -> tuple[str, int]:
        return await self._published(f"content {self.rng.randint(0, 30)}")

    async def _published(self, content: str) -> tuple[str, int]:
        made = draft(content)
        await self.store.claim_blobs("acme", made.blob_sha256s)
        version, _ = await self.store.publish(made)
        return made.digest, version.version


async def history_of(server: RedisServer, seed: int) -> tuple[list[Op], list[AliasMove], dict[int, str]]:
    server.call("FLUSHALL")
    stores = [RedisStore.from_url(server.url) for _ in range(4)]
    first = draft("first")
    await stores[0].claim_blobs("acme", first.blob_sha256s)
    await stores[0].publish(first)
    until = time.monotonic() + SECONDS
    clients = [Client(i, stores[i % len(stores)], seed, until) for i in range(8)]
    found = await asyncio.gather(*(client.run() for client in clients))
    moves = list(reversed(await stores[0].alias_moves("acme", "sql")))
    digests = {v.version: v.digest for v in (await stores[0].get("acme", "sql")).versions}
    for store in stores:
        await store.close()
    return [op for history in found for op in history], moves, digests


@pytest.mark.parametrize("seed", range(2))
async def test_what_each_saw_could_have_been_one_after_the_other(
    server: RedisServer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("redis_aliases", "store"):
        monkeypatch.setattr(f"adapter_registry.{module}.MOVES_KEPT", 10**6)
    ops, moves, digests = await history_of(server, seed)
    kinds = {kind: [op for op in ops if op.kind == kind] for kind in ("read", "write", "publish")}
    assert all(len(found) > 20 for found in kinds.values())
    check_publishes(kinds["publish"], digests)
    check_alias(kinds["write"], kinds["read"], moves)


def check_publishes(ops: list[Op], digests: dict[int, str]) -> None:
    assert sorted(digests) == list(range(1, len(digests) + 1)), "numbers without gaps"
    assert len(set(digests.values())) == len(digests), "one number for one content"
    first: dict[int, Op] = {}
    for op in sorted(ops, key=lambda op: op.ended):
        digest, version = op.value
        assert digests[version] == digest
        first.setdefault(version, op)
    for version, op in first.items():
        for later, other in first.items():
            assert not (later > version and other.ended < op.began), f"{later} was given before {version} was asked for"


def check_alias(writes: list[Op], reads: list[Op], moves: list[AliasMove]) -> None:
    """Each write of a value of its own, in the log's order: is there a moment for each, in that order, at which it could have
    happened such that each read saw the last one before it? Exact: bounds of each moment, from the write itself, from reads
    of it and of the one before, and from its neighbours."""
    by_id = {op.id: op for op in writes}
    order = [by_id[move.by] for move in moves]
    assert len(order) == len(writes)
    assert [move.before for move in moves] == [None, *(move.version for move in moves[:-1])], "a chain"
    place = {op.value: i for i, op in enumerate(order)}
    assert len(place) == len(order)
    earliest, latest = [op.began for op in order], [op.ended for op in order]
    for read in reads:
        i = -1 if read.value is None else place[read.value]
        if i >= 0:
            latest[i] = min(latest[i], read.ended)  # it had happened when the read ended …
        if i + 1 < len(order):
            earliest[i + 1] = max(earliest[i + 1], read.began)  # … and the next one had not when it began
    for i in range(1, len(order)):
        earliest[i] = max(earliest[i], earliest[i - 1])
    for i in reversed(range(len(order) - 1)):
        latest[i] = min(latest[i], latest[i + 1])
    for op, first, last in zip(order, earliest, latest, strict=True):
        assert first <= last, f"{op} has no moment at which it could have happened"


def test_the_check_sees_what_could_not_have_been() -> None:
    one, two = Op("write", "one", 1.0, 2.0, 1), Op("write", "two", 3.0, 4.0, 2)
    moves = [
        AliasMove.model_validate({"alias": "prod", "version": v, "before": b, "by": by, "at": "2026-01-01T00:00:00Z"})
        for v, b, by in ((1, None, "one"), (2, 1, "two"))
    ]
    check_alias([one, two], [Op("read", "r", 3.5, 3.6, 1), Op("read", "r", 3.5, 3.6, 2)], moves)
    slow = [Op("write", "one", 0.0, 0.5, 1), Op("write", "two", 1.0, 10.0, 2)]
    seen, unseen = Op("read", "r", 2.0, 3.0, 2), Op("read", "r", 4.0, 5.0, 1)
    for each in (seen, unseen):
        check_alias(slow, [each], moves)
    with pytest.raises(AssertionError):  # what was seen cannot be unseen, however slow the write is
        check_alias(slow, [seen, unseen], moves)
    for stale in (Op("read", "r", 4.5, 5.0, 1), Op("read", "r", 2.1, 2.9, 2), Op("read", "r", 2.5, 9.0, None)):
        with pytest.raises(AssertionError):
            check_alias([one, two], [stale], moves)
    with pytest.raises(AssertionError):
        check_alias([Op("write", "one", 5.0, 6.0, 1), two], [], moves)
    with pytest.raises(AssertionError):
        check_publishes(
            [Op("publish", "a", 3.0, 4.0, ("x", 1)), Op("publish", "b", 1.0, 2.0, ("y", 2))], {1: "x", 2: "y"}
        )
