"""Fewer, larger messages between an engine and its far consumers.

Each message through Ray costs the replica's process most of a millisecond, whatever its size. A stream's first step is
sent at once; after that a replica with many open streams sends each a little less often, so that all of them together
stay under a fixed number of messages a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from slipstream.protocol import GenerateEvent

MAX_MESSAGES_PER_S = 250.0
MAX_GAP_S = 0.1  # people read faster text than this as one flow


class Coalescer:
    """Shared by all streams of one replica: it knows how many there are."""

    def __init__(self, max_messages_per_s: float = MAX_MESSAGES_PER_S, max_gap_s: float = MAX_GAP_S) -> None:
        self._max_messages_per_s = max_messages_per_s
        self._max_gap_s = max_gap_s
        self._open = 0

    @property
    def gap_s(self) -> float:
        """The least time between two messages of one stream, now."""
        return min(self._max_gap_s, max(0, self._open - 1) / self._max_messages_per_s)

    async def batches(
        self, steps: AsyncGenerator[list[GenerateEvent], None]
    ) -> AsyncGenerator[list[GenerateEvent], None]:
        """All that `steps` yields, in order, several steps at a time when they come faster than they are taken."""
        pump = _Pump(steps)
        self._open += 1
        try:
            while True:
                batch = await pump.take()
                if not batch:
                    return
                yield batch
                if (gap_s := self.gap_s) > 0:
                    await pump.ended_within(gap_s)
        finally:
            self._open -= 1
            await pump.close()


class _Pump:
    """Drains one stream into a buffer. The engine bounds the stream's length, and with it the buffer."""

    def __init__(self, steps: AsyncGenerator[list[GenerateEvent], None]) -> None:
        self._buffer: list[GenerateEvent] = []
        self._filled = asyncio.Event()
        self._ended = asyncio.Event()
        self._task = asyncio.create_task(self._drain(steps))

    async def _drain(self, steps: AsyncGenerator[list[GenerateEvent], None]) -> None:
        try:
            async with aclosing(steps) as events:
                async for step in events:
                    self._buffer.extend(step)
                    self._filled.set()
        finally:
            self._filled.set()
            self._ended.set()

    async def take(self) -> list[GenerateEvent]:
        """What has come since the last call; empty at the end. What the stream raised comes last."""
        await self._filled.wait()
        self._filled.clear()
        batch, self._buffer = self._buffer, []
        if self._ended.is_set():
            self._filled.set()
            if not batch:
                await self._task
        return batch

    async def ended_within(self, seconds: float) -> None:
        """Wait, but not past the stream's end."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        """Close the stream, which cancels the request if it still runs."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()


def merge_events(events: Iterable[GenerateEvent]) -> list[GenerateEvent]:
    """One event a choice that says what all of its events say together."""
    merged: dict[int, list[GenerateEvent]] = {}
    for event in events:
        merged.setdefault(event.index, []).append(event)
    return [_merge_choice(parts) for _, parts in sorted(merged.items())]


def _merge_choice(parts: list[GenerateEvent]) -> GenerateEvent:
    if len(parts) == 1:
        return parts[0]
    logprobs = tuple(entry for part in parts for entry in part.logprobs or ())
    last = parts[-1]
    return GenerateEvent(
        index=last.index,
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=logprobs if any(part.logprobs is not None for part in parts) else None,
        finish_reason=last.finish_reason,
        usage=next((part.usage for part in reversed(parts) if part.usage is not None), None),
    )
