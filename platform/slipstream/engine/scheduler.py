"""The scheduler: one token budget a step, no prefill or decode phases (methods.md section 6). Pure Python.

Every sequence has some tokens known and some of them computed; a step computes more. Decodes (one token missing) come
first with their drafts, then prefill chunks of running sequences, then new ones by priority and their tenants' turns. When
blocks run out the running sequence that came last is preempted: its blocks go, and it recomputes later, with the same noise.

Over 400 lines: one owner of all sequences, whose invariants hold between its methods; what could be told apart (drafting,
pacing, fairness, prefixes) has files of its own.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter

from slipstream.engine.blocks import BlockPool
from slipstream.engine.drafting import Drafting, judge
from slipstream.engine.fairness import FairShare
from slipstream.engine.leases import AdapterLease, AdapterSlots
from slipstream.engine.pacing import PromptPacer
from slipstream.engine.plan import BlockCopy, Emission, PlannedSequence, SequenceResult, StepPlan, StepResult
from slipstream.engine.prefixes import Prefix, find, publish
from slipstream.engine.sequence import Sequence, SequenceState
from slipstream.protocol import FinishReason, work

_turn = attrgetter("turn")
_arrival = attrgetter("seq_id")  # who goes first takes the last blocks, and is not preempted for others
CHUNK_ALIGN = 64  # chunk 257 instead of 256 costs +32% (Sarathi-Serve); the last chunk of a prompt is whatever is left


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since start."""

    preemptions: int = 0
    prefix_hit_tokens: int = 0
    started: int = 0  # sequences that got blocks for the first time


class Scheduler:
    """Owner of all sequences and their blocks."""

    def __init__(self, pool: BlockPool, adapters: AdapterSlots, max_batched_tokens: int, max_num_seqs: int) -> None:
        self.pool = pool
        self.adapters = adapters
        self.max_batched_tokens = max_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.prefix_caching = True
        self.drafting = Drafting()
        self.pacer: PromptPacer | None = None  # None = prompts take the whole budget
        self._soon = 0  # waiting sequences for which the last step had no rows; their turn comes
        self._long_room: int | None = None  # rows left for long prompts in the step being planned; None = any
        self.counters = SchedulerCounters()
        self.started: list[Sequence] = []  # by the step planned last, for the first time
        self._copies: list[BlockCopy] = []  # of the step being planned
        self._shares = FairShare()
        self._waiting: list[Sequence] = []  # by turn
        self._running: list[Sequence] = []  # in order of admission
        self._leases: dict[int, AdapterLease | None] = {}  # seq_id -> lease of a running sequence
        self._by_id: dict[int, Sequence] = {}

    # -- sequences in and out -------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._by_id)

    def fits(self, max_total: int) -> bool:
        """Whether a sequence that may grow to `max_total` tokens can ever run."""
        return self.pool.blocks_for(max_total) <= self.pool.num_blocks

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. The caller has checked `fits`."""
        assert self.fits(seq.max_total), "sequence can never run"
        self._by_id[seq.seq_id] = seq
        self._shares.enter(seq.tenant, seq.weight, self._waiting)
        insort(self._waiting, seq, key=_turn)

    def abort(self, seq_id: int) -> None:
        """Drop a sequence, whatever its state; its blocks are free at once. Unknown ids are finished ones: no error."""
        seq = self._by_id.get(seq_id)
        if seq is not None:
            self._finish(seq, FinishReason.ABORTED)

    def waiting_adapters(self) -> Iterable[str]:
        """Digests the queue wants, by who starts next, each once."""
        return dict.fromkeys(s.adapter for s in self._shares.ranked(self._waiting) if s.adapter is not None)

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences without blocks, by turn."""
        return self._waiting

    def overdue(self, now: float) -> list[Sequence]:
        """Waiting sequences that should have started by now. One that has begun to answer is let finish."""
        return [s for s in self._waiting if s.start_by is not None and s.start_by <= now and not s.begun]

    def sequences_of(self, digest: str) -> list[Sequence]:
        """Waiting sequences of an adapter (to fail them when it cannot be loaded)."""
        return [s for s in self._waiting if s.adapter == digest]

    # -- one step -------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide one step. Blocks for everything planned are held when this returns."""
        planned: dict[int, PlannedSequence] = {}
        self.started, self._copies = [], []
        budget = self.max_batched_tokens
        by_arrival = sorted(self._running, key=_arrival)
        decodes = [s for s in by_arrival if self._missing(s) == 1]
        self._long_room = self.pacer.rows() if self.pacer is not None and decodes else None
        floor = self._prefill_floor()
        self.drafting.choose(decodes, self._at_work())
        for left, seq in zip(range(len(decodes), 0, -1), decodes, strict=True):
            if seq.state is SequenceState.RUNNING:  # not preempted for an older one
                budget -= self._plan_decode(seq, max(1, budget - left + 1 - floor), planned)
        for seq in by_arrival:
            if seq.state is SequenceState.RUNNING and seq.seq_id not in planned:
                budget -= self._plan_chunk(seq, budget, planned)
        self._admit(budget, planned)
        return StepPlan(tuple(self._with_streams(list(planned.values()))), tuple(self._copies))

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """What a step took, before it is committed: teaches the pacer."""
        if self.pacer is None:
            return
        decodes = paced = others = 0
        for part in plan.sequences:
            if part.samples and len(part.tokens) == part.num_drafts + 1:
                decodes += 1
            elif self._by_id[part.seq_id].paced:
                paced += len(part.tokens)
            else:
                others += len(part.tokens)
        self.pacer.observe(decodes, paced, others, seconds)

    def _with_streams(self, parts: list[PlannedSequence]) -> list[PlannedSequence]:
        """The parts, each with the streams that run at its end for the next step."""
        able, wanted = [], []
        for i, part in enumerate(parts):
            most = self._most_streams(part)
            if most:
                able.append(i)
                wanted.append((self._by_id[part.seq_id], most))
        if not wanted:
            return parts
        for i, run in zip(able, self.drafting.streams(wanted, self._at_work()), strict=True):
            if run.streams:
                parts[i] = replace(parts[i], draft_next=run.streams, draft_among=run.among)
        return parts

    def _most_streams(self, part: PlannedSequence) -> int:
        """At least one token is emitted now and one by the next step, which leaves remaining - 2 for drafts."""
        seq, lease = self._by_id[part.seq_id], self._leases[part.seq_id]
        if lease is None or not part.samples:
            return 0
        return max(0, min(lease.num_streams, seq.draft_cap, seq.remaining - 2))

    def commit(self, plan: StepPlan, result: StepResult) -> list[Emission]:
        """Take in what the step computed. Sequences aborted in between are skipped."""
        emissions = []
        for part in plan.sequences:
            seq = self._by_id.get(part.seq_id)
            if seq is None:
                continue
            if part.samples:
                emissions.append(self._commit_sampled(seq, part, result.results[part.seq_id]))
            else:
                seq.num_computed = part.start + len(part.tokens)
                self._publish(seq)
        return emissions

    def _publish(self, seq: Sequence) -> None:
        if self.prefix_caching:
            publish(seq, self.pool)

    # -- planning -------------------------------------------------------------------------------------------------

    @staticmethod
    def _missing(seq: Sequence) -> int:
        return len(seq.tokens) - seq.num_computed

    def _at_work(self) -> int:
        """Sequences that decode, or will before long."""
        return min(len(self._running) + self._soon, self.max_num_seqs)

    def _prefill_floor(self) -> int:
        """Tokens that drafts leave for prompts, so that speculation cannot hold up somebody's first token."""
        most = min(CHUNK_ALIGN, self.max_batched_tokens // 4)
        if self._waiting:
            return most
        return min(most, sum(self._paced_rows(s, missing) for s in self._running if (missing := self._missing(s)) > 1))

    def _plan_decode(self, seq: Sequence, budget: int, planned: dict[int, PlannedSequence]) -> int:
        """One known token and its drafts. Drafts give way before anybody is preempted."""
        drafts = seq.chain.tokens if seq.chain is not None else []
        k = max(0, min(len(drafts), budget - 1))
        room = self.pool.num_free + len(seq.blocks)
        while k and self.pool.blocks_for(len(seq.tokens) + k) > room:
            k -= 1
        if budget < 1 or not self._reserve(seq, len(seq.tokens) + k, planned):
            return 0
        planned[seq.seq_id] = self._part(seq, len(seq.tokens), drafts[:k])
        return 1 + k

    def _plan_chunk(self, seq: Sequence, budget: int, planned: dict[int, PlannedSequence]) -> int:
        """The next piece of a prompt (or of a recomputed sequence)."""
        size = self._chunk(seq, self._missing(seq), budget)
        end = seq.num_computed + size
        if size < 1 or not self._reserve(seq, end, planned):
            return 0
        self._take_room(seq, size)
        planned[seq.seq_id] = self._part(seq, end, [])
        return size

    def _paced_rows(self, seq: Sequence, missing: int) -> int:
        """Rows of a prompt that the next step can take, beside others that decode."""
        return min(missing, self.pacer.rows()) if self.pacer is not None and seq.paced else missing

    def _take_room(self, seq: Sequence, size: int) -> None:
        if self._long_room is not None and seq.paced:
            self._long_room -= size

    def _chunk(self, seq: Sequence, missing: int, budget: int) -> int:
        if self._long_room is not None and seq.paced:
            return min(missing, budget, self._long_room)
        if missing <= budget:
            return missing
        return budget // CHUNK_ALIGN * CHUNK_ALIGN or budget  # unaligned rather than starved by the decodes

    def _part(self, seq: Sequence, end: int, drafts: list[int]) -> PlannedSequence:
        lease = self._leases[seq.seq_id]
        samples = end == len(seq.tokens)
        p = seq.params
        return PlannedSequence(
            seq_id=seq.seq_id,
            tokens=tuple(seq.tokens[seq.num_computed : end] + drafts),
            start=seq.num_computed,
            blocks=tuple(seq.blocks),
            samples=samples,
            num_drafts=len(drafts),
            slot=lease.slot if lease else -1,
            params=p,
            output_index=seq.num_answer,
            history=tuple(seq.tokens) if p.has_penalties and samples else (),
            prompt_len=seq.prompt_len,
        )

    def _reserve(self, seq: Sequence, num_tokens: int, planned: dict[int, PlannedSequence]) -> bool:
        """Blocks for the first `num_tokens` tokens; preempts newer sequences, at worst this one (then False)."""
        while True:
            need = self.pool.blocks_for(num_tokens) - len(seq.blocks)
            if need <= 0:
                return True
            blocks = self.pool.allocate(need)
            if blocks is not None:
                seq.blocks.extend(blocks)
                return True
            victim = max((s for s in self._running if s.seq_id not in planned), key=_arrival)
            self._preempt(victim)
            if victim is seq:
                return False

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._release(seq)
        seq.num_computed = 0
        seq.num_published = 0
        seq.guesses, seq.chain = (), None
        seq.preemptions += 1
        seq.state = SequenceState.WAITING
        self.counters.preemptions += 1
        insort(self._waiting, seq, key=_turn)

    def _admit(self, budget: int, planned: dict[int, PlannedSequence]) -> None:
        """Start waiting sequences in order. One whose adapter is not here is passed over; one that lacks blocks is not,
        or long prompts would never start."""
        self._soon = passed = 0
        if len(self._running) >= self.max_num_seqs:
            return
        for seq in self._shares.order(self._waiting):
            if budget < 1 or len(self._running) >= self.max_num_seqs:
                self._soon = len(self._waiting) - passed
                return
            lease = None
            if seq.adapter is not None:
                lease = self.adapters.try_pin(seq.adapter)
                if lease is None:
                    passed += 1
                    continue
            taken = self._start(seq, lease, budget, planned)
            if not taken and seq.adapter is not None:
                self.adapters.unpin(seq.adapter)
            if taken is None:
                return
            budget -= taken
            passed += not taken

    def _start(
        self, seq: Sequence, lease: AdapterLease | None, budget: int, planned: dict[int, PlannedSequence]
    ) -> int | None:
        """Blocks for all known tokens, prefix hits first, and the rows of its first chunk. Nothing is held when that is None,
        for want of blocks, or 0: a long prompt for which others leave no room in this step, and which nobody waits behind."""
        cached, similar, known = find(seq, self.pool) if self.prefix_caching else Prefix([], -1, 0)
        seq.paced = len(seq.tokens) - known > self.max_batched_tokens and not seq.begun
        size = self._chunk(seq, len(seq.tokens) - known, budget)
        rest = self.pool.allocate(self.pool.blocks_for(len(seq.tokens)) - len(cached)) if size else []
        if not size or rest is None:
            self.pool.release(cached)
            return None if size else 0
        self._take_room(seq, size)
        if known > len(cached) * self.pool.block_size:
            self._copies.append(BlockCopy(similar, rest[0]))
        seq.blocks = cached + rest
        seq.num_computed = known
        seq.num_published = len(cached)
        if seq.preemptions == 0:
            self.counters.started += 1
            self.started.append(seq)
            seq.cached_prompt = min(known, seq.prompt_len)
            self.counters.prefix_hit_tokens += known
            self._shares.start(seq.tenant, work(seq.prompt_len - seq.cached_prompt, 0))
        seq.state = SequenceState.RUNNING
        self._waiting.remove(seq)
        self._running.append(seq)
        self._leases[seq.seq_id] = lease
        planned[seq.seq_id] = self._part(seq, known + size, [])
        return size

    # -- commit ---------------------------------------------------------------------------------------------------

    def _commit_sampled(self, seq: Sequence, part: PlannedSequence, result: SequenceResult) -> Emission:
        if result.broken:
            self._finish(seq, FinishReason.ABORTED)
            return Emission(seq.seq_id, (), (), finished=True, broken=True)
        assert 1 <= len(result.tokens) <= part.num_drafts + 1
        before = len(seq.tokens)
        reason: FinishReason | None = None
        for token in result.tokens:
            seq.tokens.append(token)
            reason = seq.stop_reason(token)
            if reason is not None:
                break  # the accepted tail after a stop is dropped
        emitted = len(seq.tokens) - before
        self._shares.charge(seq.tenant, emitted)
        seq.num_computed = min(
            part.start + len(part.tokens) - part.num_drafts + len(result.tokens) - 1, len(seq.tokens)
        )
        self._publish(seq)  # also what has just ended: an answer of one token has a prompt, too
        seq.decode_steps += 1
        seq.drafted += part.num_drafts
        accepted = min(len(result.tokens) - 1, emitted)
        seq.accepted += accepted
        judged, right = judge(seq.guesses, seq.tokens[before:])
        seq.judged += judged
        seq.right += right
        seq.guesses = result.guesses
        self.drafting.learn(seq, seq.tokens[before:])
        if reason is not None:
            self._finish(seq, reason)
        return Emission(
            seq.seq_id,
            tuple(seq.tokens[before:]),
            result.logprobs[:emitted],
            reason is not None,
            judged=judged,
            accepted=right,
        )

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.state is SequenceState.RUNNING:
            self._running.remove(seq)
            self._release(seq)
        else:
            self._waiting.remove(seq)
        seq.state = SequenceState.FINISHED
        seq.finish_reason = reason
        seq.guesses, seq.chain, seq.copy_index = (), None, None
        del self._by_id[seq.seq_id]
        self._shares.leave(seq.tenant)

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        seq.blocks = []
        if self._leases.pop(seq.seq_id) is not None:
            assert seq.adapter is not None
            self.adapters.unpin(seq.adapter)

    # -- self-check -----------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Called by tests after every step, and by the engine when it goes idle."""
        self.pool.check_integrity([s.blocks for s in self._running])
        assert set(self._leases) == {s.seq_id for s in self._running}
        assert set(self._by_id) == {s.seq_id for s in self._running} | {s.seq_id for s in self._waiting}
        for s in self._running:
            assert s.state is SequenceState.RUNNING
            assert 0 <= s.num_computed < len(s.tokens)
            assert s.num_published * self.pool.block_size <= s.num_computed
            assert len(s.blocks) * self.pool.block_size >= s.num_computed
        for s in self._waiting:
            assert s.state is SequenceState.WAITING
            assert not s.blocks
