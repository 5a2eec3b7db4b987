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

    async def run(self) -> list[Op]:
        """Until the time is over."""
        count = 0
        while time.monotonic() < self.until:
            count += 1
            id_ = f"op-{self.number}-{count}"
            kind = self.rng.choices(["read", "write", "publish", "back"], [6, 3, 2, 1])[0]
            self.history.append(await timed(kind, id_, lambda kind=kind, id_=id_: getattr(self, kind)(id_)))  # type: ignore[misc]
        return self.history

    async def read(self, id_: str) -> int:
        return (await self.store.resolve("acme", PROD)).version

    async def write(self, id_: str) -> int:
        newest = len((await self.store.get("acme", "sql")).versions)
        version = self.rng.randint(1, newest)
        await self.store.set_alias("acme", "sql", "prod", version, id_)
        return version

    async def back(self, id_: str) -> int:
        return await self.store.roll_back_alias("acme", "sql", "prod", id_)

    async def publish(self, id_: str) -> tuple[str, int]:
        made = draft(f"content {self.rng.randint(0, 30)}")
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
    kinds = {kind: [op for op in ops if op.kind == kind] for kind in ("read", "write", "back", "publish")}
    assert all(len(found) > 20 for found in kinds.values())
    check_publishes(kinds["publish"], digests)
    check_alias(kinds["write"] + kinds["back"], kinds["read"], moves)


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
    by_id = {op.id: op for op in writes}
    order = [by_id[move.by] for move in moves]
    assert [move.before for move in moves] == [None, *(move.version for move in moves[:-1])], "a chain"
    assert all(op.value == move.version for op, move in zip(order, moves, strict=True))
    latest = 0.0
    for op in order:  # each takes effect no earlier than it and those before it began …
        latest = max(latest, op.began)
        assert latest <= op.ended, "… and no later than it ended"
    # Writes that changed nothing are not in the log: they saw what they wrote, as a read would have.
    moved = {op.id for op in order}
    seen = reads + [op for op in writes if op.id not in moved and not (op.kind == "back" and op.value is None)]
    # Move i holds from somewhere after `starts[i]` until somewhere before `stops[i]`.
    starts = [0.0]
    for op in order:
        starts.append(max(starts[-1], op.began))
    stops = [op.ended for op in order] + [float("inf")]
    for i in reversed(range(len(stops) - 1)):
        stops[i] = min(stops[i], stops[i + 1])
    values = [None, *(op.value for op in order)]
    for op in seen:
        assert any(
            value == op.value and start <= op.ended and op.began <= stop
            for value, start, stop in zip(values, starts, stops, strict=True)
        ), f"{op} saw what was not there"


def test_the_check_sees_what_could_not_have_been() -> None:
    one, two = Op("write", "one", 1.0, 2.0, 1), Op("write", "two", 3.0, 4.0, 2)
    moves = [
        AliasMove.model_validate({"alias": "prod", "version": v, "before": b, "by": by, "at": "2026-01-01T00:00:00Z"})
        for v, b, by in ((1, None, "one"), (2, 1, "two"))
    ]
    check_alias([one, two], [Op("read", "r", 3.5, 3.6, 1), Op("read", "r", 3.5, 3.6, 2)], moves)
    for stale in (Op("read", "r", 4.5, 5.0, 1), Op("read", "r", 2.1, 2.9, 2), Op("read", "r", 2.5, 9.0, None)):
        with pytest.raises(AssertionError):
            check_alias([one, two], [stale], moves)
    with pytest.raises(AssertionError):
        check_alias([Op("write", "one", 5.0, 6.0, 1), two], [], moves)
    with pytest.raises(AssertionError):
        check_publishes(
            [Op("publish", "a", 3.0, 4.0, ("x", 1)), Op("publish", "b", 1.0, 2.0, ("y", 2))], {1: "x", 2: "y"}
        )
