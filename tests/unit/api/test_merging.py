"""Several engine streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from slipstream.api.merging import Batch, merged
from slipstream.errors import EngineFailed, Unavailable
from slipstream.protocol import GenerateEvent


def step(text: str) -> Batch:
    return [GenerateEvent(0, text, (1,), None, None, None)]


class Stream:
    """Yields its texts, then raises its error if it has one; may wait before either."""

    def __init__(self, *texts: str, error: Exception | None = None, waits: asyncio.Event | None = None) -> None:
        self._texts, self._error, self._waits = texts, error, waits
        self.open = False

    async def events(self) -> AsyncIterator[Batch]:
        self.open = True
        try:
            for text in self._texts:
                yield step(text)
            if self._waits is not None:
                await self._waits.wait()
            if self._error is not None:
                raise self._error
        finally:
            self.open = False


def texts(taken: list[tuple[int, Batch]]) -> list[tuple[int, str]]:
    return [(number, batch[0].text) for number, batch in taken]


@pytest.mark.parametrize("count", [1, 3])
async def test_all_steps_of_all_streams_in_order(count: int) -> None:
    streams = merged([Stream("a", "b", "c").events() for _ in range(count)], 5.0)
    await streams.start()
    came: dict[int, str] = dict.fromkeys(range(count), "")
    while taken := await streams.take():
        for number, text in texts(taken):
            came[number] += text
    assert came == dict.fromkeys(range(count), "abc")
    assert await streams.take() == []
    await streams.aclose()


@pytest.mark.parametrize("count", [1, 2])
async def test_what_is_refused_is_raised_at_the_start(count: int) -> None:
    kinds = [Stream(error=EngineFailed("no")), Stream("a", waits=asyncio.Event())][:count]
    streams = merged([each.events() for each in kinds], 5.0)
    with pytest.raises(EngineFailed):
        await streams.start()
    await streams.aclose()
    assert not any(each.open for each in kinds)


@pytest.mark.parametrize("count", [1, 2])
async def test_too_long_is_said_and_nothing_is_left_running(count: int) -> None:
    kinds = [Stream("a", waits=asyncio.Event()) for _ in range(count)]
    streams = merged([each.events() for each in kinds], 0.05)
    await streams.start()
    assert len(await streams.take()) == count
    with pytest.raises(Unavailable) as refused:
        await streams.take()
    assert refused.value.code == "timeout"
    await streams.aclose()
    assert not any(each.open for each in kinds)


async def test_a_timeout_of_the_engines_own_is_not_ours() -> None:
    streams = merged([Stream(error=TimeoutError("its own")).events()], 5.0)
    with pytest.raises(TimeoutError, match="its own"):
        await streams.start()


async def test_what_came_before_a_failure_is_not_lost() -> None:
    """It may be a whole answer, which somebody is charged for."""
    streams = merged([Stream("a", "answer").events(), Stream("b", error=EngineFailed("no")).events()], 5.0)
    await streams.start()
    assert texts(await streams.take()) == [(0, "a"), (1, "b")]
    await asyncio.sleep(0.01)  # both next steps are there: one is an answer, one an error
    assert texts(await streams.take()) == [(0, "answer")]
    with pytest.raises(EngineFailed):
        await streams.take()
    await streams.aclose()
