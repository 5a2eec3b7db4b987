"""What became of one sequence, and when: plain data for whoever draws it. Kept for requests that are traced, no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from slipstream.engine.plan import Emission, PlannedSequence, StepPlan
from slipstream.engine.sequence import Sequence
from slipstream.protocol import Origin

MAX_MARKS = 16  # steps that are kept one by one; the others are only counted


@dataclass(frozen=True, slots=True)
class StepMark:
    """One step that this sequence had a part in; times in the engine clock's seconds."""

    began: float
    ended: float
    rows: int  # tokens of this sequence that were computed
    batch_rows: int  # of all sequences
    batch_sequences: int
    tokens: int  # that came out for this sequence
    drafted: int
    accepted: int


@dataclass(slots=True, eq=False)
class Timeline:
    """Times are the engine clock's seconds; with `epoch` added they are seconds since 1970."""

    origin: Origin
    index: int  # of the choice
    epoch: float
    arrived: float
    ended: float = 0.0
    residency: str | None = None  # where its adapter was when it arrived; None = it needs none
    on_host: float | None = None  # when its adapter had been fetched, if it had to be
    on_device: float | None = None  # when its adapter came into a slot, if it was in none
    started: float | None = None  # when its first step began
    first_token: float | None = None  # when the step that gave its first token had ended
    prefill_steps: int = 0  # before and with that one
    steps: int = 0
    marks: list[StepMark] = field(default_factory=list)  # of the first MAX_MARKS steps


TimelineEnded = Callable[[Timeline, Sequence], None]


class Timelines:
    """Those of the sequences in the engine. Owned by the step thread; costs nothing while none is traced."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[int, tuple[Sequence, Timeline]] = {}
        self.on_end: TimelineEnded | None = None  # told on the step thread

    def __bool__(self) -> bool:
        return bool(self._open)

    def begin(self, seq: Sequence, timeline: Timeline, residency: str | None) -> None:
        """It came into the engine; `residency` of its adapter, then."""
        timeline.residency = residency
        self._open[seq.seq_id] = (seq, timeline)

    def fetched(self, digest: str) -> None:
        """An adapter lies in host memory."""
        for seq, timeline in self._open.values():
            if seq.adapter == digest and timeline.started is None:
                timeline.on_host = self._clock()

    def loaded(self, digest: str) -> None:
        """An adapter lies in a slot."""
        for seq, timeline in self._open.values():
            if seq.adapter == digest and timeline.started is None:
                timeline.on_device = self._clock()

    def stepped(self, plan: StepPlan, emissions: Iterable[Emission], began: float) -> None:
        """A step has been computed; it ended now."""
        came = {emission.seq_id: emission for emission in emissions}
        ended, sequences = self._clock(), len(plan.sequences)
        for planned in plan.sequences:
            found = self._open.get(planned.seq_id)
            if found is not None:
                _note(found[1], planned, came.get(planned.seq_id), (began, ended, plan.num_tokens, sequences))

    def end(self, seq: Sequence) -> None:
        """It left the engine, finished or not."""
        found = self._open.pop(seq.seq_id, None)
        if found is not None:
            found[1].ended = self._clock()
            if self.on_end is not None:
                self.on_end(found[1], seq)


def _note(
    timeline: Timeline, planned: PlannedSequence, emission: Emission | None, step: tuple[float, float, int, int]
) -> None:
    began, ended, batch_rows, batch_sequences = step
    timeline.steps += 1
    if timeline.started is None:
        timeline.started = began
    tokens = len(emission.tokens) if emission is not None else 0
    if timeline.first_token is None:
        timeline.prefill_steps += 1
        if tokens:
            timeline.first_token = ended
    if len(timeline.marks) < MAX_MARKS:
        accepted = emission.accepted if emission is not None else 0
        timeline.marks.append(
            StepMark(
                began, ended, len(planned.tokens), batch_rows, batch_sequences, tokens, planned.num_drafts, accepted
            )
        )
