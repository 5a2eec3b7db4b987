"""An engine's own account of a traced sequence, and the spans that are drawn from it: a core with a scripted runner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from support.scripted import ScriptedRunner
from support.spans import HEADER, PARENT_ID, KeptSpans, id_of, parent_of

from slipstream.engine.blocks import BlockPool
from slipstream.engine.core import EngineCore
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence
from slipstream.engine.timeline import MAX_MARKS, Timeline
from slipstream.protocol import Origin, SamplingParams
from slipstream.telemetry.engine_spans import EngineSpans

EPOCH = 1_000_000.0
STEP_S, WAIT_S = 0.25, 3.0


@dataclass(frozen=True)
class Adapter:
    nbytes: int = 100
    num_streams: int = 3


class Runner(ScriptedRunner):
    """Each step takes `STEP_S` by the test's clock."""

    def __init__(self, engine: TracedEngine) -> None:
        super().__init__(block_size=4)
        self._engine = engine

    def run(self, plan: Any) -> Any:
        self._engine.now += STEP_S
        return super().run(plan)

    def prepare_adapter(self, weights: Any) -> Adapter:
        raise AssertionError

    def load_adapter(self, slot: int, adapter: Adapter) -> None:
        pass

    def unload_adapter(self, slot: int) -> None:
        pass


@dataclass
class TracedEngine:
    """A core whose clock the test moves."""

    now: float = 100.0
    kept: KeptSpans = field(default_factory=KeptSpans)
    ended: list[Timeline] = field(default_factory=list)
    core: EngineCore[Adapter] = field(init=False)

    def __post_init__(self) -> None:
        residency = ResidencyManager(2, 10_000)
        scheduler = Scheduler(BlockPool(256, 4), residency, 32, 8)
        self.core = EngineCore(scheduler, residency, Runner(self), lambda: self.now)
        draw = EngineSpans(self.kept.tracing).draw

        def on_end(timeline: Timeline, seq: Sequence) -> None:
            self.ended.append(timeline)
            draw(timeline, seq)

        self.core.timelines.on_end = on_end

    def add(
        self, seq_id: int, prompt: int = 3, answer: int = 12, adapter: str | None = None, traced: bool = True
    ) -> Sequence:
        timeline = Timeline(Origin("req-1", HEADER), 0, EPOCH, self.now) if traced else None
        params = SamplingParams(temperature=0.0, max_tokens=answer)
        tokens = [seq_id + i for i in range(prompt)]
        seq = Sequence(
            seq_id, "acme", params, tokens, prompt, prompt + answer, frozenset(), adapter,
            draft_cap=3, arrived=self.now, timeline=timeline,
        )  # fmt: skip
        self.core.add(seq)
        return seq

    def run(self) -> None:
        while self.core.has_work:
            outcome = self.core.step()
            for digest in outcome.fetch:
                self.now += WAIT_S
                self.core.adapter_ready(digest, Adapter())


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    return span.attributes or {}


def test_a_sequence_is_an_engine_span_with_its_phases_and_their_steps() -> None:
    engine = TracedEngine()
    seq = engine.add(1, prompt=70)  # of 32 rows a step: three steps of prefill
    engine.run()
    kept = engine.kept
    outer, prefill, decode = (kept.only(name) for name in ("engine", "prefill", "decode"))
    assert parent_of(outer) == PARENT_ID
    assert {parent_of(prefill), parent_of(decode)} == {id_of(outer)}
    steps = kept.named("step")
    assert [parent_of(step) for step in steps] == [id_of(prefill)] * 3 + [id_of(decode)] * (seq.decode_steps - 1)
    assert [attributes(step)["slipstream.step.rows"] for step in steps[:3]] == [32, 32, 6]
    assert sum(attributes(step)["slipstream.step.tokens"] for step in steps) == 12
    assert attributes(prefill)["slipstream.steps"] == 3
    start = round((100 + EPOCH) * 1e9)
    assert outer.start_time == start
    assert prefill.end_time == decode.start_time == start + round(3 * STEP_S * 1e9)
    assert outer.end_time == decode.end_time == start + round((2 + seq.decode_steps) * STEP_S * 1e9)
    assert [event.name for event in outer.events] == ["first step", "first token"]


def test_drafts_are_told() -> None:
    engine = TracedEngine()
    seq = engine.add(1, adapter="sha256:a", answer=30)
    engine.run()
    assert seq.accepted > 0
    outer, steps = attributes(engine.kept.only("engine")), engine.kept.named("step")
    assert (outer["slipstream.drafted_tokens"], outer["slipstream.accepted_tokens"]) == (seq.drafted, seq.accepted)
    if len(steps) < MAX_MARKS:
        assert sum(attributes(step)["slipstream.step.accepted"] for step in steps) == seq.accepted


def test_waiting_for_an_adapter_is_told() -> None:
    engine = TracedEngine()
    engine.add(1, adapter="sha256:a")
    engine.run()
    outer = engine.kept.only("engine")
    assert attributes(outer)["slipstream.adapter"] == "sha256:a"
    assert attributes(outer)["slipstream.adapter.residency"] == "absent"
    assert attributes(outer)["slipstream.queue_seconds"] == pytest.approx(WAIT_S)
    assert [event.name for event in outer.events] == [
        "adapter in host memory", "adapter in a slot", "first step", "first token"
    ]  # fmt: skip
    engine.add(2, adapter="sha256:a")
    engine.run()
    again = engine.kept.named("engine")[1]
    assert attributes(again)["slipstream.adapter.residency"] == "on_device"
    assert [event.name for event in again.events] == ["first step", "first token"]


def test_a_long_answer_has_bounded_spans_and_all_its_counts() -> None:
    engine = TracedEngine()
    engine.add(1, answer=100)
    engine.run()
    assert len(engine.kept.named("step")) == MAX_MARKS
    decode = attributes(engine.kept.only("decode"))
    assert decode["slipstream.steps"] == decode["slipstream.decode_steps"] - 1 > MAX_MARKS


def test_what_is_cut_short_is_told_as_far_as_it_came() -> None:
    engine = TracedEngine()
    engine.add(1, answer=100)
    engine.core.step()
    engine.core.step()
    engine.core.abort(1)
    assert attributes(engine.kept.only("engine"))["gen_ai.response.finish_reasons"] == ("aborted",)
    assert len(engine.kept.named("step")) == 2
    waiting = engine.add(2, adapter="sha256:none")
    engine.core.step()
    engine.core.adapter_failed("sha256:none")
    never = engine.kept.named("engine")[1]
    assert attributes(never)["gen_ai.usage.output_tokens"] == waiting.num_answer == 0
    assert not [span for span in engine.kept.spans if parent_of(span) == id_of(never)]


def test_others_in_the_batch_cost_nothing_and_tell_nothing() -> None:
    engine = TracedEngine()
    for seq_id in range(1, 5):
        engine.add(seq_id, traced=seq_id == 2)
    engine.run()
    assert len(engine.ended) == 1
    assert not engine.core.timelines
    assert attributes(engine.kept.named("step")[-1])["slipstream.batch.sequences"] == 4
