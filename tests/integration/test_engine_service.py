"""The engine behind its event loop: concurrency, cancellation, bounds, text and failures, on a tiny real model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.adapters import random_peft_adapter, random_streams, write_own_streams
from support.spans import HEADER, UNSAMPLED
from support.tiny_model import FolderAdapters, save_tiny_model, tiny_engine_config

from slipstream.engine.sequence import Sequence
from slipstream.engine.service import EngineService
from slipstream.engine.timeline import Timeline
from slipstream.errors import AdapterUnavailable, ConfigError, ContextOverflow, EngineFailed, InvalidRequest, Overloaded
from slipstream.protocol import AdapterRef, FinishReason, GenerateEvent, GenerateRequest, Origin, SamplingParams


@asynccontextmanager
async def engine_at(folder: Path, source: FolderAdapters, **settings: Any) -> AsyncIterator[EngineService]:
    engine = EngineService(tiny_engine_config(folder, **settings), source)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderAdapters:
    model = save_tiny_model(tmp_path_factory.mktemp("base"))
    folders = {}
    for i in range(3):
        folder = tmp_path_factory.mktemp(f"a{i}")
        random_peft_adapter(model, folder, seed=i, r=2 + i)
        write_own_streams(folder, random_streams(model.config.hidden_size, 2 + i, rank=4, seed=i))
        folders[f"sha256:{i}"] = folder
    return FolderAdapters(folders)


def request(text: str = "select", adapter: str | None = None, request_id: str = "r", **params: Any) -> GenerateRequest:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params})
    ref = AdapterRef("t", adapter) if adapter else None
    return GenerateRequest(request_id, "t", sampling, text=text, adapter=ref)


async def collect(engine: EngineService, call: GenerateRequest) -> list[GenerateEvent]:
    return [event async for batch in engine.generate(call) for event in batch]


def tokens(events: list[GenerateEvent], index: int = 0) -> list[int]:
    return [t for e in events if e.index == index for t in e.token_ids]


def text_of(events: list[GenerateEvent]) -> str:
    return "".join(e.text for e in events)


async def test_many_at_once_answer_as_alone(tmp_path: Path, source: FolderAdapters) -> None:
    async with engine_at(tmp_path, source) as engine:
        calls = [
            request(
                f"row {i}", adapter=[None, "sha256:0", "sha256:1", "sha256:2"][i % 4], temperature=i % 3 / 2, seed=i
            )
            for i in range(24)
        ]
        together = await asyncio.gather(*(collect(engine, c) for c in calls))
        alone = [await collect(engine, c) for c in calls]
        assert [tokens(e) for e in together] == [tokens(e) for e in alone]
        assert [text_of(e) for e in together] == [text_of(e) for e in alone]
        stats = await engine.stats()
        assert stats.drafted_tokens > 0
        assert stats.kv_blocks_free == stats.kv_blocks_total
        assert set(stats.adapters.values()) == {"on_device"}


async def test_what_became_of_a_traced_request_is_told_before_its_end(tmp_path: Path, source: FolderAdapters) -> None:
    engine = EngineService(tiny_engine_config(tmp_path), source)
    told: list[tuple[Timeline, Sequence]] = []
    engine.trace_to(lambda timeline, seq: told.append((timeline, seq)))
    await engine.start()
    try:
        traced = replace(request("traced", "sha256:0"), origin=Origin("req-1", HEADER))
        unsampled = replace(request("not"), origin=Origin("req-2", UNSAMPLED))
        others = asyncio.gather(*(collect(engine, each) for each in (unsampled, request("nor this"))))
        before = time.time()
        assert len(tokens(await collect(engine, traced))) == 12
        ((timeline, seq),) = told
        after = time.time()
        await others
        assert len(told) == 1
        async with aclosing(engine.generate(replace(traced, params=replace(traced.params, max_tokens=200)))) as left:
            await anext(left)
        await collect(engine, request("whoever comes next"))
    finally:
        await engine.close()
    assert (timeline.origin.request_id, seq.num_answer, timeline.steps >= seq.decode_steps) == ("req-1", 12, True)
    assert None not in (timeline.on_host, timeline.on_device, timeline.started, timeline.first_token)
    times = [timeline.arrived, timeline.on_host, timeline.on_device, timeline.started, timeline.first_token]
    order = [before, *(time_ + timeline.epoch for time_ in (*times, timeline.ended) if time_ is not None), after]
    assert order == sorted(order), "in seconds since 1970, each after the other"
    assert [seq.finish_reason for _, seq in told] == [FinishReason.LENGTH, FinishReason.ABORTED]


async def test_one_fetch_serves_everybody_who_waits(tmp_path: Path, source: FolderAdapters) -> None:
    source.fetches.clear()
    async with engine_at(tmp_path, source) as engine:
        await asyncio.gather(*(collect(engine, request(f"{i}", "sha256:1")) for i in range(8)))
    assert source.fetches == ["sha256:1"]


async def test_an_adapter_that_cannot_be_had_fails_its_own_requests_only(
    tmp_path: Path, source: FolderAdapters
) -> None:
    async with engine_at(tmp_path, source) as engine:
        fine = asyncio.create_task(collect(engine, request("fine", "sha256:0", max_tokens=30)))
        with pytest.raises(AdapterUnavailable):
            await collect(engine, request("broken", "sha256:none"))
        assert len(tokens(await fine)) == 30
        source.folders["sha256:none"] = source.folders["sha256:2"]
        try:
            assert len(tokens(await collect(engine, request("mended", "sha256:none")))) == 12
        finally:
            del source.folders["sha256:none"]


async def test_adapters_are_prepared_one_at_a_time_and_none_is_late_for_waiting(
    tmp_path: Path, source: FolderAdapters
) -> None:
    async with engine_at(tmp_path, source, adapter_fetch_timeout_s=1.5) as engine:
        runner: Any = engine._runner
        prepare, at_once, most = runner.prepare_adapter, 0, 0

        def slowly(weights: Any) -> Any:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            time.sleep(0.7)  # of three the last one waits for longer than a fetch may take
            at_once -= 1
            return prepare(weights)

        runner.prepare_adapter = slowly
        answers = await asyncio.gather(*(collect(engine, request(f"{i}", f"sha256:{i}")) for i in range(3)))
    assert [len(tokens(answer)) for answer in answers] == [12] * 3
    assert most == 1


async def test_what_takes_over_is_here_before_anybody_asks_and_what_is_gone_goes(
    tmp_path: Path, source: FolderAdapters
) -> None:
    source.fetches.clear()
    async with engine_at(tmp_path, source) as engine:

        async def until(digest: str, *states: str) -> None:
            async with asyncio.timeout(10):
                while (await engine.stats()).adapters.get(digest, "absent") not in states:
                    await asyncio.sleep(0.01)

        await engine.prefetch(AdapterRef("t", "sha256:1"), "sha256:0")  # which is not here: nothing to take over
        before = await collect(engine, request("one", "sha256:0"))
        await engine.prefetch(AdapterRef("t", "sha256:1"), "sha256:0")
        await until("sha256:1", "on_host")
        assert source.fetches == ["sha256:0", "sha256:1"]
        await collect(engine, request("two", "sha256:1"))
        assert source.fetches == ["sha256:0", "sha256:1"]
        running = asyncio.create_task(collect(engine, request("long", "sha256:0", max_tokens=60)))
        await asyncio.sleep(0.02)
        await engine.forget(AdapterRef("another", "sha256:0"))
        await engine.forget(AdapterRef("t", "sha256:0"))
        assert len(tokens(await running)) == 60, "what runs is finished"
        await until("sha256:0", "absent")
        assert tokens(await collect(engine, request("one", "sha256:0"))) == tokens(before)
        await engine.prefetch(AdapterRef("t", "sha256:none"), "sha256:0")  # fails, and nobody minds
        await until("sha256:none", "failed", "absent")
        assert len(tokens(await collect(engine, request("three", "sha256:1")))) == 12


async def test_cancellation_frees_blocks(tmp_path: Path, source: FolderAdapters) -> None:
    async with engine_at(tmp_path, source) as engine:
        async with aclosing(engine.generate(request(max_tokens=200, n=3))) as events:
            await anext(events)
        async with asyncio.timeout(5):
            while (stats := await engine.stats()).running:
                await asyncio.sleep(0.001)
        assert stats.kv_blocks_free == stats.kv_blocks_total
        assert stats.completion_tokens < 600


async def test_the_queue_is_bounded(tmp_path: Path, source: FolderAdapters) -> None:
    async with engine_at(tmp_path, source, max_num_seqs=2, max_waiting=2) as engine:
        running = [asyncio.create_task(collect(engine, request(f"{i}", max_tokens=40))) for i in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as full:
            await collect(engine, request("one more"))
        assert full.value.retry_after_s >= 1
        await asyncio.gather(*running)
        assert len(tokens(await collect(engine, request("now")))) == 12


async def test_a_request_that_can_never_fit_is_not_told_to_try_again(tmp_path: Path, source: FolderAdapters) -> None:
    async with engine_at(tmp_path, source, max_num_seqs=2, max_waiting=1) as engine:
        with pytest.raises(InvalidRequest) as error:
            await collect(engine, request(n=4, temperature=1.0))
        assert error.value.param == "n"


async def test_damaged_files_fail_their_requests_and_are_tried_anew(
    tmp_path: Path, source: FolderAdapters, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = tmp_path_factory.mktemp("broken")
    copytree(source.folders["sha256:0"], broken, dirs_exist_ok=True)
    (broken / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    bad = FolderAdapters({"sha256:0": broken})
    async with engine_at(tmp_path, bad) as engine, asyncio.timeout(20):
        with pytest.raises(AdapterUnavailable):
            await collect(engine, request("x", "sha256:0"))
        bad.folders["sha256:0"] = source.folders["sha256:0"]
        assert len(tokens(await collect(engine, request("x", "sha256:0")))) == 12


async def test_an_adapter_that_overflows_breaks_its_own_requests_only(tmp_path: Path, source: FolderAdapters) -> None:
    folder = tmp_path / "evil"
    copytree(source.folders["sha256:0"], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: t * 1e30 for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    evil = FolderAdapters({**source.folders, "sha256:evil": folder})
    async with engine_at(tmp_path / "base", evil) as engine:
        fine = asyncio.create_task(collect(engine, request("fine", "sha256:1", max_tokens=30)))
        for temperature in (0.0, 0.7):
            with pytest.raises(AdapterUnavailable, match="overflow"):
                await collect(engine, request("x", "sha256:evil", temperature=temperature))
        assert len(tokens(await fine)) == 30
        engine.check_health()


async def test_the_context_is_what_the_cache_holds_and_is_told(tmp_path: Path, source: FolderAdapters) -> None:
    async with engine_at(tmp_path, source, max_model_len=64) as engine:
        assert (await engine.describe()).context_length == 64
        with pytest.raises(ContextOverflow, match="64"):
            await collect(engine, request("x" * 100))
        with pytest.raises(ContextOverflow):
            await collect(engine, request("x" * 100_000))


async def test_choices_differ_and_the_first_is_the_plain_answer(tmp_path: Path, source: FolderAdapters) -> None:
    async with engine_at(tmp_path, source) as engine:
        four = await collect(engine, request(n=4, temperature=1.0, seed=9))
        one = await collect(engine, request(temperature=1.0, seed=9))
        assert tokens(four, 0) == tokens(one)
        assert len({tuple(tokens(four, i)) for i in range(4)}) == 4


async def test_an_answer_that_is_not_streamed_comes_choice_by_choice(tmp_path: Path, source: FolderAdapters) -> None:
    """Nobody is woken for its steps; a choice that has ended no longer counts as one that is open."""
    call = request("choices", temperature=1.0, seed=5, n=3, max_tokens=20, stop=("e", "a"))
    async with engine_at(tmp_path, source) as engine:
        streamed = await collect(engine, call)
        batches = [batch async for batch in engine.generate(replace(call, stream=False))]
        for batch in batches:
            for index in {event.index for event in batch}:
                own = [event for event in batch if event.index == index]
                assert [event.finish_reason is not None for event in own] == [False] * (len(own) - 1) + [True]
        whole = [event for batch in batches for event in batch]
        assert [tokens(whole, i) for i in range(3)] == [tokens(streamed, i) for i in range(3)]


async def test_a_stop_string_ends_the_text_before_it(tmp_path: Path, source: FolderAdapters) -> None:
    async with engine_at(tmp_path, source) as engine:
        whole = text_of(await collect(engine, request("abc", "sha256:0", max_tokens=40)))
        stop = whole[7:10]
        for adapter_speculation in (None, False):
            call = GenerateRequest(
                "s", "t", SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=(stop,)),
                text="abc", adapter=AdapterRef("t", "sha256:0"), speculation=adapter_speculation,
            )  # fmt: skip
            events = await collect(engine, call)
            assert text_of(events) == whole[: whole.index(stop)]
            assert events[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {10**9: 1.0}}, "logit_bias"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"n": 10**6}, "n"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
async def test_bad_parameters_are_named(
    tmp_path: Path, source: FolderAdapters, params: dict[str, Any], param: str
) -> None:
    async with engine_at(tmp_path, source) as engine:
        with pytest.raises(InvalidRequest) as error:
            await collect(engine, request(**params))
        assert error.value.param == param


async def test_a_dead_step_loop_is_noticed_by_everybody(tmp_path: Path, source: FolderAdapters) -> None:
    async with engine_at(tmp_path, source) as engine:

        def fail(_plan: object) -> None:
            raise RuntimeError("out of memory")

        engine.check_health()
        engine._core.runner.run = fail  # type: ignore[method-assign, assignment]
        with pytest.raises(EngineFailed):
            await collect(engine, request())
        with pytest.raises(EngineFailed):
            engine.check_health()
        with pytest.raises(EngineFailed):
            await collect(engine, request())


async def test_a_cache_smaller_than_the_context_is_refused_at_start(tmp_path: Path, source: FolderAdapters) -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        async with engine_at(tmp_path, source, kv_cache_bytes=4096):
            pass
