"""The engine stepped in the caller's thread, without HTTP, Ray or an event loop: for evaluation and self-distillation."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.modeling_utils import PreTrainedModel

from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.admission import check_params
from slipstream.engine.blocks import BlockPool
from slipstream.engine.config import FastPath
from slipstream.engine.core import EngineCore
from slipstream.engine.drafting import drafting_of
from slipstream.engine.loader import LoadedModel, adopt_model, cache_shapes, context_length, eos_ids, load_model
from slipstream.engine.plan import Emission
from slipstream.engine.quantized import Quantization
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.runner import ModelRunner, PreparedAdapter
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence as EngineSequence
from slipstream.errors import AdapterUnavailable, ContextOverflow, InvalidRequest
from slipstream.protocol import FinishReason, SamplingParams

BLOCK_SIZE = 16  # tokens
ADAPTER_SLOTS = 8
# Off: to see what a speculator is worth by itself.
STREAMS_ONLY = (FastPath.ADAPTIVE_DRAFTS, FastPath.COPIED_DRAFTS, FastPath.DRAFT_VOCABULARY)
_HOST_BYTES = 1 << 40  # the caller holds the adapters: no budget of ours


@dataclass(frozen=True, slots=True)
class Row:
    """One request. `max_tokens` None, or more than the context leaves, means up to the end of the context."""

    prompt: Sequence[int]
    params: SamplingParams
    adapter: str | None = None  # a name given to `add_adapter`; None = the base model
    draft_cap: int = 0  # most drafts a step; 0 = no speculation


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row gave. Position j of `judged` and `accepted` is draft j of a step, the first one being 0."""

    tokens: tuple[int, ...]  # the end token included
    finish_reason: FinishReason
    prompt_tokens: int
    decode_steps: int  # engine steps that emitted for this row, the one that ends prefill included
    judged: tuple[int, ...] = ()  # how often draft j was verified, all drafts before it being right
    accepted: tuple[int, ...] = ()  # how often it was then right


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave, row by row in the order of the rows."""

    seconds: float
    results: tuple[RowResult, ...]

    @property
    def tokens(self) -> int:
        """Answer tokens of all rows, end tokens included."""
        return sum(len(r.tokens) for r in self.results)

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens a second over the whole run, prefill included; 0 for no rows."""
        return self.tokens / self.seconds if self.results else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Answer tokens for each engine step that emitted (ARCHITECTURE.md); 0 for no rows."""
        steps = sum(r.decode_steps for r in self.results)
        return self.tokens / steps if steps else 0.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """For each draft position, how often a draft was right when all before it were; up to the last one judged."""
        return conditional_acceptance(self.results)

    @property
    def answers(self) -> list[list[int]]:
        """The rows' answer tokens."""
        return [list(r.tokens) for r in self.results]


def conditional_acceptance(results: Iterable[RowResult]) -> tuple[float, ...]:
    """P(draft j is right | all before it are) over many rows, for each position that was judged at least once."""
    judged: list[int] = []
    accepted: list[int] = []
    for result in results:
        _add(judged, result.judged)
        _add(accepted, result.accepted)
    return tuple(right / of for right, of in zip(accepted, judged, strict=True))


def _add(totals: list[int], counts: Sequence[int]) -> None:
    totals.extend([0] * (len(counts) - len(totals)))
    for j, count in enumerate(counts):
        totals[j] += count


@dataclass(slots=True)
class _Running:
    """A row on its way."""

    index: int
    sequence: EngineSequence
    judged: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def count(self, emission: Emission) -> None:
        _add(self.judged, [1] * emission.judged)
        _add(self.accepted, [int(j < emission.accepted) for j in range(emission.judged)])

    def result(self) -> RowResult:
        seq = self.sequence
        assert seq.finish_reason is not None
        answer = tuple(seq.tokens[seq.prompt_len :])
        counts = tuple(self.judged), tuple(self.accepted)
        return RowResult(answer, seq.finish_reason, seq.prompt_len, seq.decode_steps, *counts)


class OfflineEngine:
    """A base model and named adapters in memory; `run` answers rows to their ends. One thread at a time."""

    def __init__(
        self,
        model: Path | PreTrainedModel | LoadedModel,
        dtype: str = "auto",
        adapters: Mapping[str, AdapterWeights] | None = None,
        *,
        device: str = "auto",
        eos: frozenset[int] | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 512,
        kv_cache_bytes: int = 1 << 30,
        prefix_caching: bool = False,
        disable: Collection[FastPath] = STREAMS_ONLY,
        quantize: Quantization | None = None,
    ) -> None:
        """`model` is a folder, or a model in memory, which keeps its own dtype and device.

        A model in memory is taken over: its `nn.Linear`s are replaced in place by ones that serve adapters and it is
        frozen, so it cannot be trained any more. Give a deep copy to go on with the original.
        `eos` ends answers (default: what model and generation config say; add a tokenizer's own with `loader.eos_ids`).
        Drafts are all that an adapter's streams make, so that acceptance depends neither on load nor on the prompts' words,
        unless `disable` lets them adapt, be copied, and come from
        draft vocabularies. Those learn from every run.
        Prefix caching is off, so that a second run of the same prompts costs the same as the first.
        Raises `ModelUnsupported` for a base model that the engine cannot serve.
        """
        if isinstance(model, Path):
            model = load_model(str(model), dtype, device)
        loaded = model if isinstance(model, LoadedModel) else adopt_model(model)
        self.eos = eos_ids(loaded) if eos is None else eos
        token_bytes = sum(2 * heads * dim for heads, dim in cache_shapes(loaded)) * loaded.dtype.itemsize
        useful = max_num_seqs * -(-context_length(loaded.config) // BLOCK_SIZE)
        num_blocks = max(1, min(useful, kv_cache_bytes // (token_bytes * BLOCK_SIZE)))
        self.max_length = min(context_length(loaded.config), num_blocks * BLOCK_SIZE)  # prompt and answer, in tokens
        self.max_num_seqs = max_num_seqs
        slots = max(ADAPTER_SLOTS, len(adapters or {}))
        self._vocab_size = loaded.shards.vocab_size
        self.runner = ModelRunner(loaded, num_blocks, BLOCK_SIZE, self.eos, disable, quantize)
        residency = ResidencyManager(slots, _HOST_BYTES)
        scheduler = Scheduler(BlockPool(num_blocks, BLOCK_SIZE), residency, max_batched_tokens, max_num_seqs)
        scheduler.prefix_caching = prefix_caching
        adaptive = FastPath.ADAPTIVE_DRAFTS not in disable
        costs = self.runner.row_costs(max_batched_tokens) if adaptive else None
        scheduler.drafting = drafting_of(costs, disable, cuts=self.runner.cuts_vocabulary)
        self._core = EngineCore(scheduler, residency, self.runner)
        self._adapters: dict[str, PreparedAdapter] = {}
        self._last_id = 0
        for name, weights in (adapters or {}).items():
            self.add_adapter(name, weights)

    def add_adapter(self, name: str, weights: AdapterWeights) -> None:
        """Make an adapter known under `name`, in place of one that had it.

        Raises `AdapterUnavailable` when it does not fit this base model or overflows in the engine's dtype.
        """
        try:
            prepared = self.runner.prepare_adapter(weights)
        except (ValueError, KeyError) as error:
            raise AdapterUnavailable(f"Adapter {name!r} does not fit this base model: {error}.") from error
        self.remove_adapter(name)
        self._adapters[name] = prepared

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory; unknown names are no error."""
        self._core.forget_adapter(name)
        self._adapters.pop(name, None)

    def run(
        self,
        rows: Iterable[Row],
        on_finished: Callable[[int, RowResult], None] | None = None,
        *,
        concurrency: int | None = None,
    ) -> Outcome:
        """Answer every row, at most `concurrency` at a time (default: `max_num_seqs`); a finished row lets the next in.

        `rows` may be a generator: it is read as rows are let in, so that many thousands never queue. `on_finished` gets
        a row's index and result as soon as it ends. Raises `ContextOverflow` or `InvalidRequest`, naming the row, when
        one cannot run, and `AdapterUnavailable` when an adapter's weights overflow or find no room on the device; nothing is
        left running then.
        """
        if concurrency is not None and concurrency < 1:
            raise InvalidRequest(f"concurrency is {concurrency}; it must be at least 1.", param="concurrency")
        window = min(concurrency or self.max_num_seqs, self.max_num_seqs)
        source = enumerate(rows)
        running: dict[int, _Running] = {}
        results: dict[int, RowResult] = {}
        began = time.perf_counter()
        try:
            self._admit(source, window, running)
            while running:
                for row in self._step(running):
                    results[row.index] = row.result()
                    if on_finished is not None:
                        on_finished(row.index, results[row.index])
                self._admit(source, window, running)
        finally:
            for seq_id in running:
                self._core.abort(seq_id)
        return Outcome(time.perf_counter() - began, tuple(results[i] for i in range(len(results))))

    def _admit(self, source: Iterator[tuple[int, Row]], window: int, running: dict[int, _Running]) -> None:
        while len(running) < window:
            item = next(source, None)
            if item is None:
                return
            sequence = self._sequence(*item)
            running[sequence.seq_id] = _Running(item[0], sequence)
            self._core.add(sequence)

    def _step(self, running: dict[int, _Running]) -> list[_Running]:
        """One engine step; the rows that it ended are taken out of `running` and returned."""
        with torch.inference_mode():
            outcome = self._core.step()
        for name in outcome.failed:
            raise AdapterUnavailable(f"Adapter {name!r} could not be copied to the device: most likely it has no room.")
        for name in outcome.fetch:
            self._core.adapter_ready(name, self._adapters[name])
        finished = []
        for emission in outcome.emissions:
            row = running[emission.seq_id]
            row.count(emission)
            if emission.finished:
                finished.append(running.pop(emission.seq_id))
            if emission.broken:
                whose = f"adapter {row.sequence.adapter!r}" if row.sequence.adapter else "the base model"
                advice = "Train or scale the adapter anew, or use another dtype"
                raise AdapterUnavailable(f"The weights of {whose} overflow on a prompt. {advice}.")
        return finished

    def _sequence(self, index: int, row: Row) -> EngineSequence:
        if row.adapter is not None and row.adapter not in self._adapters:
            raise InvalidRequest(f"Row {index} names adapter {row.adapter!r}, which has not been added.")
        if not row.prompt or any(not 0 <= t < self._vocab_size for t in row.prompt):
            raise InvalidRequest(f"Row {index}: the prompt must hold token ids of 0 … {self._vocab_size - 1}.")
        check_params(row.params, self._vocab_size)
        length = len(row.prompt)
        if length >= self.max_length:
            raise ContextOverflow(
                f"Row {index}: the prompt has {length} tokens; with an answer at most {self.max_length} fit."
            )
        wanted = row.params.max_tokens
        limit = self.max_length if wanted is None else min(length + wanted, self.max_length)
        self._last_id += 1
        return EngineSequence(
            self._last_id, "offline", row.params, list(row.prompt), length, limit, self.eos,
            adapter=row.adapter, draft_cap=row.draft_cap,
        )  # fmt: skip
