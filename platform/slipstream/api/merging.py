"""The engine streams of one call as one: what each step of any of them added, until a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Protocol, runtime_checkable

from slipstream.errors import Unavailable
from slipstream.protocol import GenerateEvent

Batch = list[GenerateEvent]


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


class Merged(Protocol):
    """Several streams, by number."""

    async def start(self) -> None:
        """Wait for the first step of every stream. Raises what the first to fail raises."""
        ...

    async def take(self) -> list[tuple[int, Batch]]:
        """What has come, at least one step, lowest number first; nothing when all streams have ended."""
        ...

    async def aclose(self) -> None:
        """Cancel what still runs. An engine in this process has let go of it when this returns."""
        ...


def merged(streams: Sequence[AsyncIterator[Batch]], timeout_s: float) -> Merged:
    """Raises `Unavailable` from what takes longer. The clock begins now."""
    deadline = _Deadline(timeout_s)
    return _One(streams[0], deadline) if len(streams) == 1 else _Several(streams, deadline)


class _Deadline:
    """When a call has taken too long."""

    def __init__(self, timeout_s: float) -> None:
        self.at = asyncio.get_running_loop().time() + timeout_s
        self._timeout_s = timeout_s

    def passed(self) -> Unavailable:
        """What its caller hears."""
        return Unavailable(f"The answer took longer than {self._timeout_s:g} seconds.", code="timeout")


class _One:
    """Most calls: the stream is read where it is asked for, without a task a step."""

    def __init__(self, stream: AsyncIterator[Batch], deadline: _Deadline) -> None:
        self._stream, self._deadline = stream, deadline
        self._first: Batch | None = None

    async def start(self) -> None:
        self._first = await self._next()

    async def take(self) -> list[tuple[int, Batch]]:
        batch, self._first = self._first, None
        if batch is None:
            batch = await self._next()
        return [] if batch is None else [(0, batch)]

    async def aclose(self) -> None:
        await _close(self._stream)

    async def _next(self) -> Batch | None:
        timeout = asyncio.timeout_at(self._deadline.at)
        try:
            async with timeout:
                return await anext(self._stream, None)
        except TimeoutError:
            if timeout.expired():
                raise self._deadline.passed() from None
            raise


class _Several:
    """One task for each stream that has not ended."""

    def __init__(self, streams: Sequence[AsyncIterator[Batch]], deadline: _Deadline) -> None:
        self._streams, self._deadline = streams, deadline
        self._pulls: dict[asyncio.Task[Batch | None], int] = {}

    async def start(self) -> None:
        for number in range(len(self._streams)):
            self._pull(number)
        for task in await self._wait(asyncio.FIRST_EXCEPTION):
            task.result()

    async def take(self) -> list[tuple[int, Batch]]:
        batches: list[tuple[int, Batch]] = []
        while self._pulls and not batches:
            for task in sorted(await self._wait(asyncio.FIRST_COMPLETED), key=self._pulls.__getitem__):
                if batches and task.exception() is not None:
                    break  # raised by the next call: what came before it counts
                number = self._pulls.pop(task)
                batch = task.result()
                if batch is not None:
                    self._pull(number)
                    batches.append((number, batch))
        return batches

    async def aclose(self) -> None:
        pulls, self._pulls = list(self._pulls), {}
        for task in pulls:
            task.cancel()
        # Results are of no use any more; a generator must not be closed while a task is inside it.
        await asyncio.gather(*pulls, return_exceptions=True)
        for stream in self._streams:
            await _close(stream)

    def _pull(self, number: int) -> None:
        self._pulls[asyncio.ensure_future(_next(self._streams[number]))] = number

    async def _wait(self, until: str) -> set[asyncio.Task[Batch | None]]:
        left = self._deadline.at - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait(self._pulls, timeout=max(0.0, left), return_when=until)
        late = not done or (until == asyncio.FIRST_EXCEPTION and len(done) < len(self._pulls) and not _failed(done))
        if late:
            raise self._deadline.passed()
        return done


async def _next(stream: AsyncIterator[Batch]) -> Batch | None:
    return await anext(stream, None)


async def _close(stream: AsyncIterator[Batch]) -> None:
    if isinstance(stream, _Closable):
        await stream.aclose()


def _failed(tasks: Iterable[asyncio.Task[Batch | None]]) -> bool:
    return any(task.exception() is not None for task in tasks)
