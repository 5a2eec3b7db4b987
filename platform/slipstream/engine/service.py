"""The engine as an `EngineClient`: a step loop in its own thread, requests and events on the caller's event loop.

Over 400 lines: what crosses between the two threads is one protocol, and is read together.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from slipstream.adapters.load import load_adapter
from slipstream.engine.admission import Admission, Admitted
from slipstream.engine.blocks import BlockPool
from slipstream.engine.build import build
from slipstream.engine.calls import Call, Choice, put_all
from slipstream.engine.config import EngineConfig
from slipstream.engine.core import EngineCore, Runner, StepOutcome
from slipstream.engine.drafting import drafting_of
from slipstream.engine.loader import pick_device
from slipstream.engine.observer import EngineObserver, FetchOutcome, Unobserved
from slipstream.engine.pacing import PromptPacer
from slipstream.engine.parallel.ranks import Lead, LeadRunner
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence
from slipstream.engine.text import ChoiceText
from slipstream.engine.timeline import Timeline, TimelineEnded
from slipstream.engine.waiting import Gate, too_late
from slipstream.errors import (
    AdapterUnavailable,
    EngineFailed,
    SlipstreamError,
)
from slipstream.protocol import (
    AdapterRef,
    BaseModelSpec,
    ChoiceProgress,
    EngineStats,
    GenerateEvent,
    GenerateRequest,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
Clock = Callable[[], float]

INLINE_CHARS = 8192  # prompts up to this long are tokenised on the event loop
_NO_ROOM = "This replica has no room for the adapter on its device now. Try again; if it stays, tell the operator."
_OWNERS_KEPT = 4096
_BROKEN = "The adapter's weights overflow on this prompt, so that no answer can be computed. Train or scale it anew."


class AdapterSource(Protocol):
    """Where adapters come from."""

    async def fetch(self, ref: AdapterRef, destination: Path) -> None:
        """Put the version's files into `destination`. Raises `SlipstreamError` when it cannot."""
        ...


class EngineService:
    """One engine on one event loop. `start` before use, `close` after."""

    def __init__(
        self,
        config: EngineConfig,
        source: AdapterSource,
        lead: Lead | None = None,
        clock: Clock = time.perf_counter,
        observer: EngineObserver | None = None,
    ) -> None:
        """`lead`: for an engine of several ranks, of which this is the first. `observer` is told what happens."""
        self.config = config
        self._clock = clock
        self._observer = observer or Unobserved()
        self._lead = lead
        self._source = source
        self._ids = itertools.count(1)
        self._gate = Gate(config.max_num_seqs + config.max_waiting, config.max_queue_wait_s)
        self._open: Counter[str] = Counter()  # choices not finished, by tenant
        self._choices: dict[int, Choice] = {}  # step thread's
        self._inbox: deque[Callable[[], None]] = deque()
        self._closed = False  # no more commands are taken
        self._wake = threading.Condition()
        self._stopping = False
        self._ran = False  # whether the last step computed anything
        self._failure: BaseException | None = None
        self._fetches: set[asyncio.Task[None]] = set()
        # One adapter at a time is read and laid out: several would all be late, and take the step loop's cores.
        self._preparing = asyncio.Semaphore(1)
        self._thread: threading.Thread | None = None
        self._owners: dict[str, set[str]] = {}  # digest → tenants that have it, of those used here
        self._on_timeline: TimelineEnded | None = None

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model (seconds) and start stepping."""
        self._loop = asyncio.get_running_loop()
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(loaded,), name="slipstream-step", daemon=True)
        self._thread.start()
        await asyncio.wrap_future(loaded)

    async def close(self) -> None:
        """Stop stepping; open calls end with `EngineFailed`."""
        for task in self._fetches:
            task.cancel()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        if self._lead is not None:
            self._lead.close()

    def _load(self) -> None:
        config = self.config
        if self._lead is not None:
            built = build(config, self._lead.meet(pick_device(config.device)))
            runner: Runner[Any] = LeadRunner(built.runner, self._lead)
        else:
            built = build(config)
            runner = built.runner
        self._tokenizer, self._spec, self._eos = built.tokenizer, built.spec, built.eos_ids
        residency = ResidencyManager(config.adapter_slots, config.host_adapter_bytes)
        pool = BlockPool(built.num_blocks, config.block_size)
        scheduler = Scheduler(pool, residency, config.max_batched_tokens, config.max_num_seqs)
        scheduler.prefix_caching = config.prefix_caching
        scheduler.pacer = PromptPacer(config.long_prompt_stretch)
        scheduler.drafting = drafting_of(built.costs, config.disable, cuts=built.runner.cuts_vocabulary)
        self._runner = runner
        self._core = EngineCore(scheduler, residency, runner, self._clock, self._observer)
        self._core.timelines.on_end = self._timeline_ended if self._on_timeline is not None else None
        self._admission = Admission(self._tokenizer, self._spec.vocab_size, self._spec.context_length, config.max_draft)
        self._stats = self._core.stats()

    def trace_to(self, on_end: TimelineEnded) -> None:
        """Before `start`. `on_end` is told on the event loop what became of each sequence whose request is traced, before
        its caller hears of its end."""
        self._on_timeline = on_end

    def _timeline_ended(self, timeline: Timeline, seq: Sequence) -> None:
        assert self._on_timeline is not None
        self._loop.call_soon_threadsafe(self._on_timeline, timeline, seq)

    def check_health(self) -> None:
        """Raises `EngineFailed` when the step loop has died."""
        if self._failure is not None or self._thread is None or not self._thread.is_alive():
            raise EngineFailed("The engine's step loop has stopped; this replica must be replaced.")

    # -- EngineClient ---------------------------------------------------------------------------------------------

    async def describe(self) -> BaseModelSpec:
        """The base model behind this engine."""
        return self._spec

    async def stats(self) -> EngineStats:
        """The counters as of the last step. Raises `EngineFailed` when there will be no further one."""
        self.check_health()
        return self._stats

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[GenerateEvent], None]:
        """See `EngineClient.generate`."""
        self.check_health()
        admitted = await self._admit(request)
        self._gate.check(request, len(admitted.choices), self._open, self._stats)
        call = self._make_call(request, admitted)
        if request.adapter is not None:
            self._note_owner(request.adapter)
        self._post(lambda: self._submit(call))
        unfinished = len(call.choices)
        self._open[request.tenant] += unfinished
        try:
            while unfinished:
                item = await call.queue.get()
                if isinstance(item, SlipstreamError):
                    raise item
                done = sum(event.finish_reason is not None for event in item)
                unfinished -= done
                self._open -= Counter({request.tenant: done})
                yield item
        finally:
            if unfinished:
                self._open -= Counter({request.tenant: unfinished})
                with suppress(EngineFailed):
                    self._post(lambda: self._cancel(call))

    async def _admit(self, request: GenerateRequest) -> Admitted:
        """Tokenising a long prompt takes a while: not on the loop that carries everybody's streams."""
        size = len(request.text or "") + sum(len(m.content) for m in request.messages or ())
        if size <= INLINE_CHARS:
            return self._admission.admit(request)
        return await asyncio.to_thread(self._admission.admit, request)

    def _make_call(self, request: GenerateRequest, admitted: Admitted) -> Call:
        call = Call(request.adapter, self._gate.allowed_wait_s(request), copy_context(), request.stream)
        now = self._clock()
        for index, params in enumerate(admitted.choices):
            done = request.progress[index] if request.progress else ChoiceProgress()
            if done.finished:
                continue
            text = ChoiceText(self._tokenizer, admitted.prompt, params)
            for token in done.token_ids:
                text.push(token)
            text.take(finished=False)  # the caller has it
            seq = Sequence(
                seq_id=next(self._ids),
                tenant=request.tenant,
                params=params,
                tokens=[*admitted.prompt, *done.token_ids],
                prompt_len=len(admitted.prompt),
                max_total=admitted.max_total,
                eos_ids=self._eos,
                adapter=request.adapter.digest if request.adapter else None,
                draft_cap=admitted.draft_cap,
                on_token=text.push,
                priority=request.priority,
                weight=request.weight,
                arrived=now,
                # Of the first choice alone: when it has started, the client is in the middle of its answer.
                start_by=None if request.progress or index else now + call.allowed_wait_s,
                decode_steps=done.decode_steps,
                drafted=len(done.token_ids) - done.decode_steps,
                accepted=len(done.token_ids) - done.decode_steps,
                timeline=self._timeline(request, index, now),
            )
            call.choices.append(Choice(index, seq, text, call))
        log.debug("admitted: %d prompt tokens, %d choices", len(admitted.prompt), len(call.choices))
        return call

    def _timeline(self, request: GenerateRequest, index: int, now: float) -> Timeline | None:
        if self._on_timeline is None or request.origin is None or not request.origin.sampled:
            return None
        return Timeline(request.origin, index, epoch=time.time() - now, arrived=now)

    # -- the step thread ------------------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> None:
        """Have the step thread run something between two steps. Raises `EngineFailed` when it takes no more."""
        with self._wake:
            if self._closed:
                raise EngineFailed("The engine has stopped; this replica is being replaced.")
            self._inbox.append(command)
            self._wake.notify()

    def _run(self, loaded: Future[None]) -> None:
        """The step thread: it loads the model as well, see docs/decisions/0005."""
        try:
            self._load()
        except Exception as error:  # raised by `start`
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            while self._take_commands():
                outcome = self._core.step()
                self._ran = outcome.ran or bool(outcome.failed)  # somebody else may want the slot
                self._stats = self._core.stats()  # before the events, so that who has the last one sees it counted
                self._deliver(outcome)
        except Exception as error:  # the top loop: whatever it is, callers must hear of it
            log.exception("step loop failed")
            self._failure = error
        finally:
            self._fail_all()

    def _take_commands(self) -> bool:
        """Run posted commands; sleeps while there is nothing to do. False = stop."""
        with self._wake:
            if not self._core.has_work and not self._inbox:
                self._core.check_integrity()
            # Sequences that wait for an adapter are woken by its arrival; the timeout guards against a lost wake-up.
            while not self._inbox and not self._stopping and not (self._core.has_work and self._ran):
                if not self._wake.wait(timeout=1.0) and self._core.has_work:
                    break
        while self._inbox:  # only this thread takes from it
            self._inbox.popleft()()
        return not self._stopping

    def _submit(self, call: Call) -> None:
        for choice in call.choices:
            self._choices[choice.seq.seq_id] = choice
            self._core.add(choice.seq)

    def _cancel(self, call: Call) -> None:
        for choice in call.choices:
            self._choices.pop(choice.seq.seq_id, None)
            self._core.abort(choice.seq.seq_id)

    def _deliver(self, outcome: StepOutcome) -> None:
        for seq_ids in outcome.failed.values():
            self._fail([self._choices.pop(seq_id) for seq_id in seq_ids], _NO_ROOM)
        for seq_id in outcome.overdue:
            call = self._choices.pop(seq_id).call
            self._loop.call_soon_threadsafe(call.queue.put_nowait, too_late(call.allowed_wait_s))
        for digest in outcome.fetch:
            waiting = self._choices[self._core.scheduler.sequences_of(digest)[0].seq_id]
            ref = waiting.call.adapter  # any tenant's copy will do: the digest says that they are the same
            assert ref is not None
            self._loop.call_soon_threadsafe(self._start_fetch, ref, context=waiting.call.context)
        batches: dict[int, tuple[Call, list[GenerateEvent]]] = {}
        for emission in outcome.emissions:
            choice = self._choices[emission.seq_id]
            if emission.finished:
                del self._choices[emission.seq_id]
            if emission.broken:
                choice.call.context.copy().run(
                    log.error, "adapter %s: the hidden state is not finite", choice.seq.adapter
                )
                self._loop.call_soon_threadsafe(choice.call.queue.put_nowait, AdapterUnavailable(_BROKEN))
                continue
            if ready := choice.ready(choice.event(emission, self._tokenizer)):
                batches.setdefault(id(choice.call), (choice.call, []))[1].extend(ready)
        if batches:
            self._loop.call_soon_threadsafe(put_all, list(batches.values()))

    def _fail_all(self) -> None:
        """Answer everybody who is or was about to be here."""
        with self._wake:
            self._closed = True
        while self._inbox:
            try:
                self._inbox.popleft()()  # so that calls posted too late are known, and answered below
            except Exception:  # the core may be in any state now; nobody's answer depends on this
                log.exception("a command failed after the step loop")
        error = EngineFailed("The engine stopped while this request was open. Try again.")
        for call in {id(c.call): c.call for c in self._choices.values()}.values():
            self._loop.call_soon_threadsafe(call.queue.put_nowait, error)

    # -- adapters (event loop) ------------------------------------------------------------------------------------

    async def prefetch(self, ref: AdapterRef, instead_of: str) -> None:
        """Fetch an adapter that is likely to be asked for soon, if the one that it replaces is on this replica."""
        self._note_owner(ref)

        def begin() -> None:
            if self._core.residency.prefetch(ref.digest, instead_of):
                self._loop.call_soon_threadsafe(self._start_fetch, ref)

        self._post(begin)

    async def forget(self, ref: AdapterRef) -> None:
        """Let go of an adapter as soon as nobody uses it, unless another tenant has the same one here."""
        owners = self._owners.pop(ref.digest, set()) - {ref.tenant}
        if owners:
            self._owners[ref.digest] = owners
        else:
            self._post(lambda: self._core.residency.doom(ref.digest))

    def _note_owner(self, ref: AdapterRef) -> None:
        self._owners.setdefault(ref.digest, set()).add(ref.tenant)
        if len(self._owners) > _OWNERS_KEPT:
            here = self._stats.adapters
            self._owners = {digest: owners for digest, owners in self._owners.items() if digest in here}

    def _start_fetch(self, ref: AdapterRef) -> None:
        task = self._loop.create_task(self._fetch(ref))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    async def _fetch(self, ref: AdapterRef) -> None:
        """Download, read and lay out one adapter; the step loop goes on meanwhile."""
        began = self._clock()
        try:
            with tempfile.TemporaryDirectory(prefix=".scratch-", dir=self._scratch()) as folder:
                async with asyncio.timeout(self.config.adapter_fetch_timeout_s):
                    await self._source.fetch(ref, Path(folder))
                async with self._preparing:
                    prepared = await _in_own_thread(lambda: self._runner.prepare_adapter(load_adapter(Path(folder))))
        except Exception as error:  # a top loop: whoever waits for this adapter must hear of it, whatever it was
            log.exception("adapter %s could not be loaded", ref.digest, extra={"shows_error": True})
            late = isinstance(error, TimeoutError)
            self._observer.fetched(FetchOutcome.LATE if late else FetchOutcome.FAILED, self._clock() - began)
            outcome: Callable[[], None] = partial(self._adapter_failed, ref.digest, late)
        else:
            self._observer.fetched(FetchOutcome.OK, self._clock() - began)
            log.info("adapter %s was loaded into host memory in %.3f s", ref.digest, self._clock() - began)
            outcome = partial(self._core.adapter_ready, ref.digest, prepared)
        with suppress(EngineFailed):
            self._post(outcome)

    def _scratch(self) -> str | None:
        if self.config.scratch_dir is not None:
            Path(self.config.scratch_dir).mkdir(parents=True, exist_ok=True)
        return self.config.scratch_dir

    def _adapter_failed(self, digest: str, late: bool) -> None:
        why = "took too long to load" if late else "could not be loaded"
        victims = [self._choices.pop(seq_id) for seq_id in self._core.adapter_failed(digest)]
        self._fail(victims, f"The adapter {why} on this replica. Try again; if it stays, publish it anew.")

    def _fail(self, choices: list[Choice], message: str) -> None:
        """End the calls of these choices, all of one adapter."""
        for call in {id(c.call): c.call for c in choices}.values():
            self._loop.call_soon_threadsafe(call.queue.put_nowait, AdapterUnavailable(message))


async def _in_own_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with it: a pooled one would keep its OpenMP team, see docs/decisions/0005."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slipstream-adapter")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)
