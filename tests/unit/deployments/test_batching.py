"""Coalescing loses nothing, delays no first step, and cancels what nobody reads any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from deployments.batching import Coalescer, merge_events
from slipstream.errors import InvalidRequest
from slipstream.protocol import FinishReason, GenerateEvent, TokenLogprob, Usage


def event(number: int, index: int = 0) -> GenerateEvent:
    return GenerateEvent(index, f" {number}", (number,))


class Source:
    """Steps on demand; knows whether it was closed early."""

    def __init__(self, steps: int, delay_s: float = 0.0, error: Exception | None = None) -> None:
        self.steps, self.delay_s, self.error, self.cancelled = steps, delay_s, error, False

    async def stream(self) -> AsyncGenerator[list[GenerateEvent], None]:
        try:
            for number in range(self.steps):
                await asyncio.sleep(self.delay_s)
                yield [event(number)]
            if self.error is not None:
                raise self.error
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled = True
            raise


def texts(batches: list[list[GenerateEvent]]) -> str:
    return "".join(event.text for batch in batches for event in batch)


async def test_everything_arrives_in_order_and_no_batch_is_empty() -> None:
    batches = [batch async for batch in Coalescer().batches(Source(50).stream())]
    assert texts(batches) == "".join(f" {n}" for n in range(50))
    assert all(batches)


async def test_a_slow_reader_gets_fewer_larger_batches() -> None:
    batches = []
    async for batch in Coalescer().batches(Source(50).stream()):
        batches.append(batch)
        await asyncio.sleep(0.01)
    assert len(batches) < 10
    assert texts(batches) == "".join(f" {n}" for n in range(50))


async def test_the_first_step_does_not_wait_and_the_end_does_not_either() -> None:
    coalescer = Coalescer(max_messages_per_s=0.1, max_gap_s=30.0)
    keep_busy = coalescer.batches(Source(10**6, 0.01).stream())
    async with asyncio.timeout(5), aclosing(keep_busy) as other:
        await anext(other)
        batches = [batch async for batch in coalescer.batches(Source(3, 0.01).stream())]
    assert [len(batch) for batch in batches] == [1, 2]


async def test_an_error_comes_after_all_that_was_produced() -> None:
    batches = Coalescer().batches(Source(3, error=InvalidRequest("no")).stream())
    seen = []

    async def read() -> None:
        async for batch in batches:
            seen.append(batch)

    with pytest.raises(InvalidRequest):
        await read()
    assert texts(seen) == " 0 1 2"


async def test_an_error_at_once_is_raised_by_the_first_step() -> None:
    with pytest.raises(InvalidRequest):
        await anext(Coalescer().batches(Source(0, error=InvalidRequest("no")).stream()))


async def test_closing_cancels_the_source() -> None:
    source, coalescer = Source(10**6, 0.001), Coalescer()
    batches: Any = coalescer.batches(source.stream())
    await anext(batches)
    await batches.aclose()
    assert source.cancelled
    assert coalescer.gap_s == 0


async def test_cancelling_a_waiting_reader_cancels_the_source() -> None:
    source = Source(1, delay_s=60)
    reader = asyncio.ensure_future(anext(Coalescer().batches(source.stream())))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert source.cancelled


async def test_the_gap_grows_with_the_streams_up_to_its_bound() -> None:
    coalescer = Coalescer(max_messages_per_s=100, max_gap_s=0.015)
    streams: list[Any] = [coalescer.batches(Source(10**6, 0.001).stream()) for _ in range(3)]
    gaps = []
    for stream in streams:
        await anext(stream)
        gaps.append(coalescer.gap_s)
    for stream in streams:
        await stream.aclose()
    assert gaps == [0.0, 0.01, 0.015]


def test_merging_says_what_the_parts_said() -> None:
    usage = Usage(1, 2, 2, 0, 0)
    entry = TokenLogprob("a", 1, -0.5, b"a")
    parts = [
        replace(event(0), logprobs=(entry,)),
        event(7, index=1),
        replace(event(1), logprobs=(entry,), finish_reason=FinishReason.STOP, usage=usage),
    ]
    first, second = merge_events(parts)
    assert first == GenerateEvent(0, " 0 1", (0, 1), (entry, entry), FinishReason.STOP, usage)
    assert second == event(7, index=1)
    assert merge_events([]) == []
