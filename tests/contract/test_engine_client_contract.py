"""What every `EngineClient` keeps to. A new implementation is one more entry in `ENGINES`.

An engine under contract needs a vocabulary of at least 50 tokens, a context of at least 64, and a chat template.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.tiny_model import NoAdapters, tiny_engine_config

from slipstream.engine.observer import StepFacts, Unobserved
from slipstream.engine.service import EngineService
from slipstream.errors import ClientError, ContextOverflow, InvalidRequest, Overloaded
from slipstream.protocol import (
    ChatMessage,
    ChoiceProgress,
    EngineClient,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    SamplingParams,
    Usage,
)
from slipstream.testing import FakeEngine


@asynccontextmanager
async def fake_engine() -> AsyncIterator[EngineClient]:
    """The public fake; a little slow, so that a request can be caught running."""
    yield FakeEngine(step_delay_s=0.001)


@asynccontextmanager
async def real_engine() -> AsyncIterator[EngineClient]:
    """The engine itself, in this process, over a tiny random model."""
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineService(tiny_engine_config(Path(folder)), NoAdapters())
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()


def small_fake_engine() -> AbstractAsyncContextManager[EngineClient]:
    """Takes two choices at a time."""
    return nullcontext(FakeEngine(step_delay_s=0.001, capacity=2))


@asynccontextmanager
async def small_real_engine() -> AsyncIterator[EngineClient]:
    """Takes two choices at a time."""
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineService(tiny_engine_config(Path(folder), max_num_seqs=1, max_waiting=1), NoAdapters())
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()


EngineFactory = Callable[[], AbstractAsyncContextManager[EngineClient]]
ENGINES: list[Any] = [
    pytest.param(fake_engine, id="fake"),
    pytest.param(real_engine, id="real"),
]  # of EngineFactory, with marks where they need some


@pytest_asyncio.fixture(params=ENGINES)
async def engine_client(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    """The engine under contract."""
    factory: EngineFactory = request.param
    async with factory() as engine:
        yield engine


def asked(request_id: str = "r1", **params: Any) -> GenerateRequest:
    """A greedy request of eight tokens."""
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params})
    return GenerateRequest(request_id, "demo", sampling, text="the quick brown fox")


async def run(engine: EngineClient, request: GenerateRequest) -> list[GenerateEvent]:
    return [event async for batch in engine.generate(request) for event in batch]


def tokens_of(events: list[GenerateEvent], index: int = 0) -> list[int]:
    return [token for event in events if event.index == index for token in event.token_ids]


def usage_of(events: list[GenerateEvent], index: int = 0) -> Usage:
    last = [event for event in events if event.index == index][-1]
    assert last.usage is not None
    return last.usage


async def test_the_last_event_of_a_choice_ends_it(engine_client: EngineClient) -> None:
    events = await run(engine_client, asked())
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert [event.usage is not None for event in events] == [True] + [False] * (len(events) - 2) + [True]
    assert events[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


async def test_usage_adds_up(engine_client: EngineClient) -> None:
    events = await run(engine_client, asked())
    usage = usage_of(events)
    assert usage.completion_tokens == len(tokens_of(events)) <= 8
    assert 0 < usage.decode_steps <= usage.completion_tokens
    assert 0 <= usage.accepted_tokens <= usage.drafted_tokens
    assert usage.decode_steps + usage.accepted_tokens >= usage.completion_tokens
    assert usage.prompt_tokens > 0
    assert 0 <= usage.cached_prompt_tokens <= usage.prompt_tokens


async def test_max_tokens_is_kept(engine_client: EngineClient) -> None:
    events = await run(engine_client, asked(max_tokens=3))
    assert len(tokens_of(events)) == 3
    assert events[-1].finish_reason is FinishReason.LENGTH


async def test_greedy_answers_repeat(engine_client: EngineClient) -> None:
    first, second = await run(engine_client, asked("a")), await run(engine_client, asked("b"))
    assert tokens_of(first) == tokens_of(second)


async def test_a_seed_repeats_the_answer(engine_client: EngineClient) -> None:
    sampled = asked(temperature=1.0, seed=2**64 - 1)
    first, second = await run(engine_client, sampled), await run(engine_client, replace(sampled, request_id="r2"))
    assert tokens_of(first) == tokens_of(second)


@pytest.mark.parametrize("speculation", [False, True, 0, 1, 8])
async def test_speculation_never_changes_the_answer(engine_client: EngineClient, speculation: bool | int) -> None:
    plain = await run(engine_client, asked("a"))
    drafted = await run(engine_client, replace(asked("b"), speculation=speculation))
    assert tokens_of(drafted) == tokens_of(plain)
    if speculation is False or speculation == 0:
        assert usage_of(drafted).drafted_tokens == 0
        assert usage_of(drafted).decode_steps == usage_of(drafted).completion_tokens


async def test_whole_answers_are_the_streamed_ones(engine_client: EngineClient) -> None:
    streamed = await run(engine_client, asked("a"))
    whole = await run(engine_client, replace(asked("b"), stream=False))
    assert tokens_of(whole) == tokens_of(streamed)
    assert "".join(event.text for event in whole) == "".join(event.text for event in streamed)


def progress_after(events: list[GenerateEvent], index: int) -> ChoiceProgress:
    own = [event for event in events if event.index == index]
    finished = any(event.finish_reason is not None for event in own)
    return ChoiceProgress(tuple(tokens_of(events, index)), len(own), finished)


@pytest.mark.parametrize("cut", [1, 2, 5])
async def test_another_engine_goes_on_where_one_stopped(engine_client: EngineClient, cut: int) -> None:
    """Neither a token nor a character is repeated or lost, stop strings, choices and counts included."""
    request = asked(n=2, temperature=1.0, seed=7, max_tokens=12, logprobs=1, stop=("zzz", "yy"))
    request = replace(request, speculation=False)  # drafts follow what was learnt before: their counts may differ
    whole = await run(engine_client, request)
    head = whole[:cut]
    progress = tuple(progress_after(head, index) for index in range(2))
    tail = await run(engine_client, replace(request, request_id="r2", progress=progress))
    for index in range(2):
        both = [*head, *tail]
        assert tokens_of(both, index) == tokens_of(whole, index)
        assert "".join(e.text for e in both if e.index == index) == "".join(e.text for e in whole if e.index == index)
        assert replace(usage_of(both, index), cached_prompt_tokens=0) == replace(
            usage_of(whole, index), cached_prompt_tokens=0
        )


async def test_every_choice_ends(engine_client: EngineClient) -> None:
    events = await run(engine_client, asked(n=3, temperature=1.0))
    assert {event.index for event in events} == {0, 1, 2}
    for index in range(3):
        assert usage_of(events, index).completion_tokens == len(tokens_of(events, index))


async def test_chat_and_token_prompts(engine_client: EngineClient) -> None:
    chat = replace(asked("a"), text=None, messages=(ChatMessage("user", "hello"),))
    assert tokens_of(await run(engine_client, chat))
    tokens = replace(asked("b"), text=None, token_ids=(5, 6, 7))
    assert usage_of(await run(engine_client, tokens)).prompt_tokens == 3


async def test_logprobs_come_with_their_tokens(engine_client: EngineClient) -> None:
    events = await run(engine_client, asked(logprobs=2))
    scores = [score for event in events for score in event.logprobs or ()]
    assert [score.token_id for score in scores] == tokens_of(events)
    for score in scores:
        assert score.logprob <= 0
        assert len(score.top) == 2
        assert score.top[0].logprob >= score.top[1].logprob
    assert all(event.logprobs is None for event in await run(engine_client, asked("b")))


async def test_a_prompt_over_the_context_is_refused_at_once(engine_client: EngineClient) -> None:
    spec = await engine_client.describe()
    request = replace(asked(), text=None, token_ids=(5,) * (spec.context_length + 1))
    with pytest.raises(ContextOverflow):
        await anext(engine_client.generate(request))


async def test_tokens_outside_the_vocabulary_are_refused(engine_client: EngineClient) -> None:
    spec = await engine_client.describe()
    outside = replace(asked(), text=None, token_ids=(spec.vocab_size,))
    with pytest.raises(ClientError):
        await anext(engine_client.generate(outside))
    with pytest.raises(ClientError):
        await anext(engine_client.generate(asked("b", logit_bias={spec.vocab_size: 1.0})))


async def eventually_idle(engine: EngineClient) -> None:
    async with asyncio.timeout(5):
        while True:
            stats = await engine.stats()
            if (stats.running, stats.waiting) == (0, 0):
                return
            await asyncio.sleep(0.005)


async def test_closing_the_iterator_cancels(engine_client: EngineClient) -> None:
    events = engine_client.generate(asked(max_tokens=40))
    assert isinstance(events, AsyncGenerator)
    await anext(events)
    await events.aclose()
    await eventually_idle(engine_client)


async def test_cancelling_the_task_cancels(engine_client: EngineClient) -> None:
    task = asyncio.create_task(run(engine_client, asked(max_tokens=40)))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually_idle(engine_client)


async def test_stats_count(engine_client: EngineClient) -> None:
    before = await engine_client.stats()
    usage = usage_of(await run(engine_client, asked()))
    after = await engine_client.stats()
    assert after.completion_tokens - before.completion_tokens == usage.completion_tokens
    assert after.drafted_tokens - before.drafted_tokens == usage.drafted_tokens
    assert after.accepted_tokens - before.accepted_tokens == usage.accepted_tokens
    assert after.steps > before.steps
    assert after.kv_blocks_free <= after.kv_blocks_total


class Seen(Unobserved):
    """What an engine tells its observer."""

    def __init__(self) -> None:
        self.steps: list[StepFacts] = []
        self.waits: list[float] = []

    def stepped(self, facts: StepFacts) -> None:
        self.steps.append(facts)

    def started(self, adapter: str | None, waited_s: float) -> None:
        self.waits.append(waited_s)


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
async def test_an_observer_hears_of_steps_and_starts(real: bool, tmp_path: Path) -> None:
    seen = Seen()
    config = tiny_engine_config(tmp_path)
    engine = EngineService(config, NoAdapters(), observer=seen) if real else FakeEngine(observer=seen)
    if isinstance(engine, EngineService):
        await engine.start()
    try:
        await run(engine, asked(n=2, temperature=1.0))
        stats = await engine.stats()
    finally:
        if isinstance(engine, EngineService):
            await engine.close()
    assert len(seen.steps) == stats.steps
    assert len(seen.waits) == 2
    assert all(wait >= 0 for wait in seen.waits)
    assert all(0 < facts.tokens <= facts.budget and facts.sequences >= 1 for facts in seen.steps)


async def test_the_description_is_plain_data(engine_client: EngineClient) -> None:
    spec = await engine_client.describe()
    assert json.loads(json.dumps(dataclasses.asdict(spec)))["id"] == spec.id
    assert spec.base_digest.startswith("sha256:")


@pytest.mark.parametrize("small_engine", [small_fake_engine, small_real_engine])
async def test_only_what_could_fit_later_is_overload(small_engine: EngineFactory) -> None:
    async with small_engine() as engine:
        with pytest.raises(InvalidRequest):
            await run(engine, asked(n=3))
        first = engine.generate(asked("r1", n=1, max_tokens=40))
        await anext(first)
        with pytest.raises(Overloaded):
            await run(engine, asked("r2", n=2))
        await first.aclose()
