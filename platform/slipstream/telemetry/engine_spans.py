"""From an engine's timeline of a sequence to spans: engine → prefill, decode → step."""

from __future__ import annotations

from opentelemetry.trace import Span
from opentelemetry.util.types import AttributeValue

from slipstream.engine.sequence import Sequence
from slipstream.engine.timeline import StepMark, Timeline
from slipstream.protocol import FinishReason, Origin
from slipstream.telemetry.propagation import carried
from slipstream.telemetry.tracing import Attributes, Tracing, nanoseconds


class EngineSpans:
    """Draws what an engine tells of each traced sequence."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def draw(self, timeline: Timeline, seq: Sequence) -> None:
        """A sequence has ended."""
        span = self._span(timeline, timeline.origin, "engine", _sequence(timeline, seq), timeline.arrived)
        for name, at in _events(timeline):
            span.add_event(name, timestamp=self._ns(timeline, at))
        origin = carried(timeline.origin, span)
        if timeline.started is not None:
            self._phases(timeline, seq, origin)
        span.end(self._ns(timeline, timeline.ended))

    def _phases(self, timeline: Timeline, seq: Sequence, origin: Origin) -> None:
        assert timeline.started is not None
        turn = timeline.first_token if timeline.first_token is not None else timeline.ended
        prefill = {
            "slipstream.steps": timeline.prefill_steps,
            "gen_ai.usage.input_tokens": seq.prompt_len,
            "gen_ai.usage.cache_read.input_tokens": seq.cached_prompt,
        }
        early = [mark for mark in timeline.marks if mark.ended <= turn]
        self._phase(timeline, origin, "prefill", prefill, (timeline.started, turn), early)
        if timeline.first_token is not None and timeline.steps > timeline.prefill_steps:
            decode = {"slipstream.steps": timeline.steps - timeline.prefill_steps, **_counts(seq)}
            late = timeline.marks[len(early) :]
            self._phase(timeline, origin, "decode", decode, (turn, timeline.ended), late)

    def _phase(
        self,
        timeline: Timeline,
        origin: Origin,
        name: str,
        attributes: Attributes,
        when: tuple[float, float],
        marks: list[StepMark],
    ) -> None:
        span = self._span(timeline, origin, name, attributes, when[0])
        beneath = carried(origin, span)
        for mark in marks:
            self._span(timeline, beneath, "step", _step(mark), mark.began).end(self._ns(timeline, mark.ended))
        span.end(self._ns(timeline, when[1]))

    def _span(self, timeline: Timeline, origin: Origin, name: str, attributes: Attributes, at: float) -> Span:
        return self._tracing.beneath(origin, name, attributes, start_s=at + timeline.epoch)

    def _ns(self, timeline: Timeline, at: float) -> int:
        return nanoseconds(at + timeline.epoch)


def _sequence(timeline: Timeline, seq: Sequence) -> Attributes:
    began = timeline.started if timeline.started is not None else timeline.ended
    known: dict[str, AttributeValue] = {
        "slipstream.request_id": timeline.origin.request_id,
        "slipstream.tenant": seq.tenant,
        "slipstream.choice": timeline.index,
        "slipstream.queue_seconds": began - timeline.arrived,
        "slipstream.preemptions": seq.preemptions,
        "gen_ai.response.finish_reasons": [(seq.finish_reason or FinishReason.ABORTED).value],
        **_counts(seq),
    }
    if seq.adapter is not None:
        known |= {"slipstream.adapter": seq.adapter, "slipstream.adapter.residency": timeline.residency or "absent"}
    return known


def _counts(seq: Sequence) -> dict[str, int]:
    return {
        "gen_ai.usage.output_tokens": seq.num_answer,
        "slipstream.decode_steps": seq.decode_steps,
        "slipstream.drafted_tokens": seq.drafted,
        "slipstream.accepted_tokens": seq.accepted,
    }


def _step(mark: StepMark) -> Attributes:
    return {
        "slipstream.step.rows": mark.rows,
        "slipstream.step.tokens": mark.tokens,
        "slipstream.step.drafted": mark.drafted,
        "slipstream.step.accepted": mark.accepted,
        "slipstream.batch.rows": mark.batch_rows,
        "slipstream.batch.sequences": mark.batch_sequences,
    }


def _events(timeline: Timeline) -> list[tuple[str, float]]:
    times = {
        "adapter in host memory": timeline.on_host,
        "adapter in a slot": timeline.on_device,
        "first step": timeline.started,
        "first token": timeline.first_token,
    }
    return [(name, at) for name, at in times.items() if at is not None]
