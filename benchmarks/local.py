"""Our engine, stepped in this process: no HTTP, no Ray, no event loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.blocks import BlockPool
from slipstream.engine.core import EngineCore
from slipstream.engine.loader import eos_ids, load_model
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.runner import ModelRunner
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence as EngineSequence
from slipstream.protocol import SamplingParams

BLOCKS, BLOCK_SIZE = 2048, 16


@dataclass(frozen=True)
class Row:
    """One request."""

    prompt: Sequence[int]
    params: SamplingParams
    adapter: str | None = None
    draft_cap: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    seconds: float
    sequences: list[EngineSequence]

    @property
    def tokens_per_s(self) -> float:
        return sum(s.num_answer for s in self.sequences) / self.seconds

    @property
    def tokens_per_step(self) -> float:
        return sum(s.num_answer for s in self.sequences) / sum(s.decode_steps for s in self.sequences)

    @property
    def answers(self) -> list[list[int]]:
        return [s.tokens[s.prompt_len :] for s in self.sequences]


class LocalEngine:
    """Model and adapters in memory; `run` serves a batch to its end."""

    def __init__(self, path: Path, dtype: str, adapters: Mapping[str, AdapterWeights]) -> None:
        loaded = load_model(str(path), dtype, "cpu")
        self._eos = eos_ids(loaded)
        self.runner = ModelRunner(loaded, BLOCKS, BLOCK_SIZE, max(1, len(adapters)), self._eos)
        residency = ResidencyManager(max(1, len(adapters)), 1 << 40)
        scheduler = Scheduler(BlockPool(BLOCKS, BLOCK_SIZE), residency, 512, 64)
        scheduler.prefix_caching = False  # every round computes its own prompts
        self._core = EngineCore(scheduler, residency, self.runner)
        self._adapters = dict(adapters)
        self._next_id = 0

    def run(self, rows: Sequence[Row]) -> Outcome:
        """All rows at once."""
        sequences = [self._add(row) for row in rows]
        began = time.perf_counter()
        with torch.inference_mode():
            while self._core.has_work:
                for digest in self._core.step().fetch:
                    self._core.adapter_ready(digest, self.runner.prepare_adapter(self._adapters[digest]))
        return Outcome(time.perf_counter() - began, sequences)

    def _add(self, row: Row) -> EngineSequence:
        self._next_id += 1
        limit = row.params.max_tokens or 16
        seq = EngineSequence(
            self._next_id, "bench", row.params, list(row.prompt), len(row.prompt), len(row.prompt) + limit, self._eos,
            adapter=row.adapter, draft_cap=row.draft_cap,
        )  # fmt: skip
        self._core.add(seq)
        return seq
