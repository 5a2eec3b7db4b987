"""A client that goes away: what it cancels, and what it must not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message

from slipstream.api.connection import while_connected
from slipstream.api.errors import ClientGone


class Client:
    """Stays until `leaves`."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def own_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def test_work_is_done_while_its_client_stays() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await while_connected(Client().receive, work()) == 7


@pytest.mark.parametrize("kind", ["stops", "fails", "goes on"])
async def test_work_has_ended_when_its_client_is_reported_gone(kind: str) -> None:
    client, ended = Client(), False

    async def work() -> str:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # it lets go of its engine
            ended = True
            if kind == "fails":
                raise ValueError("on the way out") from None
            if kind == "goes on":
                return "done"
            raise
        return ""

    asyncio.get_running_loop().call_soon(client.leaves.set)
    if kind == "goes on":
        assert await while_connected(client.receive, work()) == "done"
    else:
        with pytest.raises(ClientGone):
            await while_connected(client.receive, work())
    assert ended
    assert own_task().cancelling() == 0
    await asyncio.sleep(0)


async def test_a_client_that_leaves_just_when_work_is_done_cancels_nothing_later() -> None:
    """Whoever of the two is first: what comes after must not be cancelled."""
    for wakers in ("client first", "work first"):
        client, finished = Client(), asyncio.Event()

        async def work(finished: asyncio.Event = finished) -> str:
            await finished.wait()
            return "done"

        def both(client: Client = client, finished: asyncio.Event = finished, order: str = wakers) -> None:
            first, second = (client.leaves, finished) if order == "client first" else (finished, client.leaves)
            first.set()
            second.set()

        asyncio.get_running_loop().call_soon(both)
        try:
            assert await while_connected(client.receive, work()) == "done"
        except ClientGone:
            assert wakers == "client first"
        for _ in range(5):
            await asyncio.sleep(0)
        assert own_task().cancelling() == 0


async def test_whoever_else_cancels_is_heard() -> None:
    client = Client()
    inner = asyncio.ensure_future(while_connected(client.receive, asyncio.Event().wait()))
    await asyncio.sleep(0)
    inner.cancel()
    client.leaves.set()
    with pytest.raises(asyncio.CancelledError):
        await inner


async def test_a_connection_that_cannot_be_read_is_over() -> None:
    async def receive() -> Message:
        raise OSError("reset")

    with pytest.raises(ClientGone):
        await while_connected(receive, asyncio.Event().wait())
