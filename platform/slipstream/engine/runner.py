"""Runs a `StepPlan` on the model: one forward, one verification, one draft. The only part of the engine that owns tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from slipstream.adapters.weights import AdapterWeights, StreamWeights
from slipstream.engine.attention import KVCache, PagedBatch
from slipstream.engine.batch import StepBatch, build_batch, verified
from slipstream.engine.config import FastPath
from slipstream.engine.costs import (
    COST_ADAPTERS,
    COST_RANK,
    COST_STREAM_RANK,
    GREEDY,
    best_times,
    cost_parts,
    cost_vocabulary,
    row_counts,
)
from slipstream.engine.finite import are_finite
from slipstream.engine.flat import FlatDecoder
from slipstream.engine.goodput import COST_GROUP, RowCosts
from slipstream.engine.guessing import Guesser
from slipstream.engine.head import Head
from slipstream.engine.kernels import Kernels, pick_kernels
from slipstream.engine.linear import RowContext, as_is, swap_linears
from slipstream.engine.loader import PROBE, LoadedModel, cache_shapes, context_length
from slipstream.engine.lora import AdapterBank
from slipstream.engine.parallel.group import all_well
from slipstream.engine.parallel.vocab import ShardedColumns
from slipstream.engine.picking import Picker
from slipstream.engine.plan import Logprob, PlannedSequence, SequenceResult, StepPlan, StepResult
from slipstream.engine.quantized import Quantization, torch_int8, weight_maker
from slipstream.engine.sampling import Columns, Sampler, logprob_of
from slipstream.engine.stacks import PreparedLora
from slipstream.engine.streams import PreparedStreams, StreamBank, prepare_streams
from slipstream.errors import ModelUnsupported

if TYPE_CHECKING:
    from slipstream.engine.graphs import GraphedDecoder


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter in the engine's dtype and layout, ready to go into a slot."""

    lora: PreparedLora
    streams: PreparedStreams | None

    @property
    def nbytes(self) -> int:
        """Bytes it holds, for the host budget."""
        tensors = [t for m in self.lora.modules.values() for t in m.tensors()]
        tensors += self.streams.tensors() if self.streams is not None else []
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def num_streams(self) -> int:
        """K."""
        return self.streams.bias.shape[0] if self.streams is not None else 0


class ModelRunner:
    """The model, its KV cache and its adapters."""

    def __init__(
        self,
        loaded: LoadedModel,
        num_blocks: int,
        block_size: int,
        eos_ids: frozenset[int],
        disable: Collection[FastPath] = (),
        quantize: Quantization | None = None,
        kernels: Kernels | None = None,
        fully_sharded_loras: bool = False,
    ) -> None:
        """`kernels` None: as `disable` and the device say. `fully_sharded_loras`: see `parallel/lora.py`.

        Raises `ModelUnsupported` when its own forward is not the model's, or when its linears cannot be quantised so.
        """
        self.device = loaded.device
        self._decoder = loaded.decoder
        self._embedding = loaded.embedding
        head_name = next(n for n, m in loaded.model.named_modules() if m is loaded.head)
        head_weight = loaded.head.weight.data
        self._rows = RowContext()
        name = type(loaded.model).__name__
        shapes = cache_shapes(loaded)
        kernels = kernels or pick_kernels(self.device, disable, loaded.dtype, shapes, block_size)
        full = as_is if FastPath.PACKED_WEIGHTS in disable else kernels.weights
        int8 = torch_int8 if FastPath.PACKED_WEIGHTS in disable else kernels.int8
        make = weight_maker(full, quantize, head_name, int8)
        self._shards = loaded.shards
        first = as_is if quantize is not None else make
        groups = swap_linears(loaded.model, self._rows, first, self._shards, fully_sharded_loras)
        like = torch.empty(0, dtype=loaded.dtype, device=self.device)
        self._bank = AdapterBank(groups, self._rows, like, kernels.lora)
        self._streams = StreamBank(kernels.streams)
        member = loaded.model.get_submodule(head_name)
        self._head = Head(
            member, head_name, head_weight, loaded.config, self._bank, self._shards, kernels.greedy, kernels.scores
        )  # fmt: skip
        self.cuts_vocabulary = self._head.scores_some  # whether streams can pick from a draft vocabulary
        self._hidden_size = loaded.head.in_features
        several = self._shards.group.size > 1
        columns = ShardedColumns(kernels.best, self._shards) if several else Columns(kernels.best)
        # Who scores candidates again meets the other ranks for it, so all ranks must sample one way.
        draw = kernels.draw if all_well(self._shards.group, kernels.draw is not None, self.device) else None
        self._sampler = Sampler(self._shards.vocab_size, eos_ids, self.device, columns, draw)
        self._picker = Picker(self._head, self._sampler, rescore=loaded.dtype != torch.float32)
        self._guesser = Guesser(self._streams, self._picker, self._embedding)
        self.cache = KVCache(shapes, num_blocks, block_size, loaded.dtype, self.device, spare_blocks=1)
        blocks = min(num_blocks, -(-context_length(loaded.config) // block_size))
        self._attention = kernels.attention
        walks = FastPath.FLAT_DECODER not in disable
        walk = partial(FlatDecoder.of, self._decoder, kernels.ops, FastPath.WHOLE_DECODER not in disable)
        self._flat = walk() if walks else None
        self._graphs: GraphedDecoder | None = None  # recordings hold on to weights: none before these are final
        self._check_against(loaded.probe_logits, name, 1e-3 if loaded.dtype == torch.float32 else 0.1)
        if quantize is not None:  # only now: rounded weights say nothing about whether the forward is the model's
            for group in groups.values():
                group.remake(make)
            self._flat = walk() if walks else None
        if self._flat is not None:  # transformers' own forwards may look at values on the way, which a recording cannot
            self._graphs = kernels.graphs(self._flat, self._rows, self.cache, blocks)

    # -- adapters -------------------------------------------------------------------------------------------------

    def prepare_adapter(self, weights: AdapterWeights) -> PreparedAdapter:
        """Check, cast and lay out one adapter in host memory. Touches nothing shared: meant for a worker thread.

        Raises `ValueError` when it does not fit this base model or overflows in the engine's dtype.
        """
        with torch.inference_mode():
            like = torch.empty(0, dtype=self._embedding_dtype())
            self._check_streams(weights.streams)
            weights = self._shards.adapter(weights)
            streams = self._prepare_streams(weights.streams, like) if weights.streams is not None else None
            return PreparedAdapter(self._bank.prepare(weights), streams)

    def _check_streams(self, weights: StreamWeights | None) -> None:
        if weights is None:
            return
        if weights.bias.shape[1] != self._hidden_size:
            raise ValueError("streams: hidden size does not fit this base model")
        if weights.head is not None and weights.head.shape[1:] != (self._sampler.vocab_size, self._hidden_size):
            raise ValueError("streams: the LM heads do not fit this base model")

    def _prepare_streams(self, weights: StreamWeights, like: torch.Tensor) -> PreparedStreams:
        streams = prepare_streams(weights, like)
        if not are_finite(streams.tensors()):
            raise ValueError(f"streams: weights overflow in {like.dtype}")
        return streams.packed() if self.device.type == "cpu" else streams

    def load_adapter(self, slot: int, adapter: PreparedAdapter) -> None:
        """Put an adapter into a free slot, between steps. When it raises, the slot is still free, on every rank."""
        failure: Exception | None = None
        lora, streams = adapter.lora, adapter.streams
        try:
            lora = lora.to(self.device)
            streams = streams.to(self.device) if streams is not None else None
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
            failure = error
        if not all_well(self._shards.group, failure is None, self.device):
            raise failure or RuntimeError("another rank has no room for this adapter")
        self._bank.load(slot, lora)
        self._streams.load(slot, streams)

    def unload_adapter(self, slot: int) -> None:
        """Empty a slot, between steps."""
        self._bank.unload(slot)
        self._streams.unload(slot)

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Copy → forward → verify → guess."""
        if plan.copies:
            self.cache.copy(plan.copies)
        parts = plan.sequences
        order = self._bank.order([part.slot for part in parts], [len(part.tokens) for part in parts])
        batch = self._batch([parts[i] for i in order])
        hidden = self._forward(batch)
        if not batch.spans:
            return StepResult()
        sampled = hidden[batch.sample_rows]
        picks, logits = self._picker.pick(batch.requests, sampled, batch.sample_slots)
        broken = (~sampled.isfinite().all(dim=-1)).tolist()  # finite weights may still overflow in the forward
        decided = verified(batch, [pick.token for pick in picks])
        guesses = self._guesser.guess(batch, sampled, decided, broken)
        results = {}
        for (part, first), tokens in zip(batch.spans, decided, strict=True):
            if any(broken[first : first + part.num_drafts + 1]):
                results[part.seq_id] = SequenceResult((), broken=True)
                continue
            logprobs: tuple[Logprob, ...] = ()
            if logits is not None:
                logprobs = self._logprobs(part, logits[first : first + len(tokens)], tokens)
            results[part.seq_id] = SequenceResult(tuple(tokens), guesses.get(part.seq_id, ()), logprobs)
        return StepResult(results)

    def _batch(self, parts: list[PlannedSequence]) -> StepBatch:
        """The sequences' tensors; padded to a number of rows that there is a graph for."""
        if self._graphs is not None:
            parts = parts + self._graphs.padding(sum(len(part.tokens) for part in parts))
        return build_batch(parts, self.cache, self.device, self._attention)

    def _forward(self, batch: StepBatch) -> torch.Tensor:
        """Final hidden states [n, H], valid until the next call."""
        self._bank.use(batch.slots)
        out = self._graphs(batch) if self._graphs is not None else None
        return out if out is not None else self._decode(batch.input_ids, batch.positions, batch.paged)

    def _decode(self, ids: torch.Tensor, positions: torch.Tensor, paged: PagedBatch) -> torch.Tensor:
        if self._flat is not None:
            return self._flat(ids, positions, paged)
        out = self._decoder(
            input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, paged=paged
        )
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def _logprobs(self, part: PlannedSequence, logits: torch.Tensor, tokens: Sequence[int]) -> tuple[Logprob, ...]:
        wanted = part.params.logprobs
        if wanted is None:
            return ()
        logits = self._sampler.columns.whole(logits)
        return tuple(logprob_of(row, token, wanted) for row, token in zip(logits, tokens, strict=True))

    # -- costs ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def row_costs(self, most: int) -> RowCosts:
        """What 1, 2, 4, … rows cost, up to `most`, with a few blank adapters in turns and short contexts. Uses slots and the
        cache: for an engine that holds nothing yet."""
        lora = self._bank.blank(COST_RANK, self._head.name)
        for slot in range(COST_ADAPTERS):
            self._bank.load(slot, lora)
            self._streams.load(slot, self._blank_streams())
        ids = [cost_vocabulary(slot, self._sampler.vocab_size) for slot in range(COST_ADAPTERS)]
        counts = row_counts(most)
        works: list[list[Callable[[], object]]] = [[], [], [], [], []]
        for count in counts:
            alone, together = (cost_parts(count, group, self.cache) for group in (1, COST_GROUP))
            batch = self._batch(together)
            hidden = self._forward(batch)[batch.sample_rows]
            guess = partial(
                self._guesser.guess, sampled=hidden, decided=[[PROBE[0]]] * len(together), broken=[False] * len(hidden)
            )
            works[0].append(partial(self._forward_parts, alone))
            works[1].append(partial(self._forward_parts, together))
            works[2].append(partial(self._picker.pick, batch.requests, hidden, batch.sample_slots))
            works[3].append(partial(guess, batch))
            if self.cuts_vocabulary:
                spans = [(replace(part, draft_among=ids[part.slot]), first) for part, first in batch.spans]
                works[4].append(partial(guess, replace(batch, spans=tuple(spans))))
        alone_s, decoder_s, head_s, streams_s, cut_s = best_times(works, self.device)
        for slot in range(COST_ADAPTERS):
            self._bank.unload(slot)
            self._streams.unload(slot)
        return RowCosts(counts, decoder_s, head_s, alone_s, streams_s, cut_s or None)

    def _forward_parts(self, parts: list[PlannedSequence]) -> torch.Tensor:
        return self._forward(self._batch(parts))

    def _blank_streams(self) -> PreparedStreams:
        low = torch.zeros(COST_GROUP, COST_STREAM_RANK, self._hidden_size)
        bias = torch.zeros(COST_GROUP, self._hidden_size)
        weights = StreamWeights(bias, a=low, b=low.transpose(1, 2).contiguous(), c=low)
        return prepare_streams(weights, torch.empty(0, dtype=self._embedding_dtype())).to(self.device)

    # -- self-check -----------------------------------------------------------------------------------------------

    def _embedding_dtype(self) -> torch.dtype:
        return next(self._embedding.parameters()).dtype

    @torch.inference_mode()
    def _check_against(self, reference: torch.Tensor, name: str, most: float) -> None:
        """A forward of ours must be transformers' own: refuses models whose attention or head do more than we know of."""
        blocks = tuple(range(-(-len(PROBE) // self.cache.block_size)))
        part = PlannedSequence(0, PROBE, 0, blocks, True, len(PROBE) - 1, -1, GREEDY, 0, 0)
        try:
            batch = self._batch([part])
            ours = self._head(self._forward(batch)[batch.sample_rows], batch.sample_slots).float()
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            raise ModelUnsupported(f"{name} cannot run on paged attention: {error}") from error
        # Over all logits rather than the worst one: bf16 alone moves single logits of a deep model by several percent.
        distance = float((ours - reference).norm() / (reference - reference.mean(dim=-1, keepdim=True)).norm())
        if not distance < most:
            raise ModelUnsupported(
                f"{name} does not give transformers' own logits on paged attention: its attention or head does something "
                "that this engine does not know."
            )
