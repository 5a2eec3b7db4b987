"""The engine's single-threaded heart: whoever calls it owns it. `service.py` runs it in a thread."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.blocks import BlockPool
from slipstream.engine.observer import AdapterMove, EngineObserver, StepFacts, Unobserved
from slipstream.engine.plan import Emission, StepPlan, StepResult
from slipstream.engine.residency import Residency, ResidencyManager, ResidencyPlan
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence
from slipstream.engine.timeline import Timelines
from slipstream.engine.waiting import StartRate
from slipstream.protocol import EngineStats, Queued, work

log = logging.getLogger(__name__)


class Prepared(Protocol):
    """An adapter ready for a slot (`slipstream.engine.runner.PreparedAdapter`)."""

    @property
    def nbytes(self) -> int:
        """For the host budget."""
        ...

    @property
    def num_streams(self) -> int:
        """K."""
        ...


P = TypeVar("P", bound=Prepared)


class Runner(Protocol[P]):
    """What the core needs of `slipstream.engine.runner.ModelRunner`; tests drive it with a scripted one."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        ...

    def prepare_adapter(self, weights: AdapterWeights) -> P:
        """Lay an adapter out (any thread)."""
        ...

    def load_adapter(self, slot: int, adapter: P) -> None:
        """Host → device. When it raises, the slot is still free."""
        ...

    def unload_adapter(self, slot: int) -> None:
        """Free a slot."""
        ...


@dataclass(slots=True)
class StepOutcome:
    """What one step changed for the outside."""

    emissions: list[Emission] = field(default_factory=list)
    fetch: list[str] = field(default_factory=list)  # digests to download now
    failed: dict[str, list[int]] = field(default_factory=dict)  # digests that no slot could take → sequences dropped
    overdue: list[int] = field(default_factory=list)  # sequences dropped because they waited too long
    ran: bool = False


class EngineCore(Generic[P]):
    """Scheduler, residency and runner, stepped together."""

    def __init__(
        self,
        scheduler: Scheduler,
        residency: ResidencyManager,
        runner: Runner[P],
        clock: Callable[[], float] = time.perf_counter,
        observer: EngineObserver | None = None,
    ) -> None:
        """`clock` gives seconds: how long steps take and requests wait is read from it. `observer` is told what happens."""
        self.scheduler = scheduler
        self.residency = residency
        self.runner = runner
        self._clock = clock
        self._observer = observer or Unobserved()
        self.sequences: dict[int, Sequence] = {}
        self._on_host: dict[str, P] = {}
        self._steps = 0
        self._starts = StartRate()
        self.timelines = Timelines(clock)
        self._requests = self._finished = 0
        self._work = 0.0  # of all tokens so far, those of unfinished answers included
        self._totals = [0, 0, 0, 0]  # prompt, completion, drafted, accepted tokens of finished sequences

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return self.scheduler.has_work

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.sequences[seq.seq_id] = seq
        self._requests += 1
        self._work += work(seq.prompt_len, 0)
        if seq.timeline is not None:
            residency = self.residency.state(seq.adapter).value if seq.adapter is not None else None
            self.timelines.begin(seq, seq.timeline, residency)
        self.scheduler.add(seq)

    def abort(self, seq_id: int) -> None:
        """Drop a sequence; its blocks are free when this returns."""
        seq = self.sequences.pop(seq_id, None)
        if seq is not None:
            self.scheduler.abort(seq_id)
            self._count(seq)

    def adapter_ready(self, digest: str, adapter: P) -> None:
        """A fetch asked for by `step` is complete."""
        self._on_host[digest] = adapter
        self.residency.fetched(digest, adapter.nbytes, adapter.num_streams)
        self.timelines.fetched(digest)

    def adapter_failed(self, digest: str) -> list[int]:
        """A fetch or a load did not work out: its waiting sequences are dropped; returns their ids."""
        self.residency.failed(digest)
        self._on_host.pop(digest, None)
        victims = [s.seq_id for s in self.scheduler.sequences_of(digest)]
        for seq_id in victims:
            self.abort(seq_id)
        return victims

    def forget_adapter(self, digest: str) -> None:
        """Free an adapter's slot and host memory; no sequence may be using it. Unknown digests are no error."""
        slot = self.residency.forget(digest)
        if slot is not None:
            self._unload(slot)
        if self._on_host.pop(digest, None) is not None:
            self._observer.moved(AdapterMove.DROPPED)

    def step(self) -> StepOutcome:
        """Move adapters, then: schedule → run → commit."""
        outcome = StepOutcome()
        self._drop_overdue(outcome)
        self._move_adapters(outcome)
        plan = self.scheduler.schedule()
        if plan.sequences:
            began = self._clock()
            for seq in self.scheduler.started:
                self._observer.started(seq.adapter, began - seq.arrived)
            result = self.runner.run(plan)
            took_s = self._clock() - began
            self.scheduler.observe(plan, took_s)
            self._observer.stepped(
                StepFacts(len(plan.sequences), plan.num_tokens, self.scheduler.max_batched_tokens, took_s)
            )
            outcome.emissions = self.scheduler.commit(plan, result)
            if self.timelines:
                self.timelines.stepped(plan, outcome.emissions, began)
            outcome.ran = True
            self._steps += 1
        for emission in outcome.emissions:
            self._work += len(emission.tokens)
            adapter = self.sequences[emission.seq_id].adapter
            if emission.judged and adapter is not None:
                self._observer.judged(adapter, emission.judged, emission.accepted)
            if emission.finished:
                self._count(self.sequences.pop(emission.seq_id))
        # Not at the next step: there may be none for hours.
        self._free(self.residency.let_go(set(self.scheduler.waiting_adapters())))
        started, running = self.scheduler.counters.started, self.scheduler.num_running
        self._starts.observe(self._clock(), len(self._queue()), started, running)
        return outcome

    def _queue(self) -> list[Sequence]:
        """Sequences that wait for room and nothing else: not for an adapter on its way, nor in the middle of an answer."""
        ready = [s for s in self.scheduler.waiting if not s.preemptions and not s.num_answer]
        return [s for s in ready if s.adapter is None or self.residency.state(s.adapter) is Residency.ON_DEVICE]

    def _drop_overdue(self, outcome: StepOutcome) -> None:
        outcome.overdue = [seq.seq_id for seq in self.scheduler.overdue(self._clock())]
        for seq_id in outcome.overdue:
            self.abort(seq_id)

    def _move_adapters(self, outcome: StepOutcome) -> None:
        plan = self.residency.plan(self.scheduler.waiting_adapters())
        for digest, slot in plan.unload:
            self._unload(slot)
            log.debug("adapter %s was evicted from slot %d", digest, slot)
        for digest, slot in plan.load:
            try:
                self.runner.load_adapter(slot, self._on_host[digest])
                self.timelines.loaded(digest)
            except (RuntimeError, MemoryError):  # torch's out-of-memory errors are RuntimeErrors; the others go on
                log.exception("adapter %s could not be copied to the device", digest)
                self._observer.moved(AdapterMove.LOAD_FAILED)
                outcome.failed[digest] = self.adapter_failed(digest)
            else:
                self._observer.moved(AdapterMove.LOADED)
        for digest in plan.drop:
            self._drop(digest)
        outcome.fetch = plan.fetch

    def _free(self, plan: ResidencyPlan) -> None:
        for _, slot in plan.unload:
            self._unload(slot)
        for digest in plan.drop:
            self._drop(digest)

    def _unload(self, slot: int) -> None:
        self.runner.unload_adapter(slot)
        self._observer.moved(AdapterMove.EVICTED)

    def _drop(self, digest: str) -> None:
        del self._on_host[digest]
        self._observer.moved(AdapterMove.DROPPED)

    def _count(self, seq: Sequence) -> None:
        self._finished += 1
        counts = (seq.prompt_len, seq.num_answer, seq.drafted, seq.accepted)
        self._totals = [total + n for total, n in zip(self._totals, counts, strict=True)]
        self.timelines.end(seq)

    def stats(self) -> EngineStats:
        """A snapshot; running sequences' tokens are counted when they finish."""
        pool: BlockPool = self.scheduler.pool
        queue, now = self._queue(), self._clock()
        return EngineStats(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            kv_blocks_total=pool.num_blocks,
            kv_blocks_free=pool.num_free,
            steps=self._steps,
            prompt_tokens=self._totals[0],
            completion_tokens=self._totals[1],
            drafted_tokens=self._totals[2],
            accepted_tokens=self._totals[3],
            preemptions=self.scheduler.counters.preemptions,
            prefix_hit_tokens=self.scheduler.counters.prefix_hit_tokens,
            adapters=self.residency.snapshot(),
            sequences=self._requests,
            finished=self._finished,
            work_tokens=self._work,
            queue_wait_s=max((now - seq.arrived for seq in queue), default=0.0),
            queue=tuple(
                Queued(*key, count)
                for key, count in Counter((seq.tenant, seq.weight, seq.priority) for seq in queue).items()
            ),
            starts_per_s=self._starts.per_s,
            adapter_slots=self.residency.num_slots,
            slots_free=self.residency.num_free_slots,
            adapters_wanted=sum(
                self.residency.state(digest) is not Residency.ON_DEVICE
                for digest in {seq.adapter for seq in self.scheduler.waiting if seq.adapter is not None}
            ),
        )

    def check_integrity(self) -> None:
        """Every manager's own check."""
        self.scheduler.check_integrity()
        self.residency.check_integrity()
