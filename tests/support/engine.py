"""A whole engine driven by hand: no threads, no event loop, `check_integrity` after every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slipstream.adapters.load import load_adapter
from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.blocks import BlockPool
from slipstream.engine.config import FastPath
from slipstream.engine.core import EngineCore
from slipstream.engine.drafting import drafting_of
from slipstream.engine.kernels import Kernels
from slipstream.engine.loader import adopt_model, eos_ids
from slipstream.engine.plan import Logprob
from slipstream.engine.quantized import Quantization
from slipstream.engine.residency import ResidencyManager
from slipstream.engine.runner import ModelRunner
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence
from slipstream.protocol import SamplingParams


@dataclass
class Job:
    """One sequence to run."""

    prompt: Rows[int]
    params: SamplingParams
    adapter: str | None = None
    draft_cap: int = 0
    tenant: str = "t"
    start_step: int = 0
    sequence: Sequence | None = None
    logprobs: list[Logprob] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        assert self.sequence is not None
        return self.sequence.tokens[self.sequence.prompt_len :]


class Harness:
    """An `EngineCore` over a real model; adapters are fetched from a mapping, at once."""

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, Path | AdapterWeights] | None = None,
        *,
        num_blocks: int = 256,
        block_size: int = 16,
        max_batched_tokens: int = 256,
        max_num_seqs: int = 32,
        slots: int = 16,
        copy_model: bool = True,
        eos: frozenset[int] | None = None,
        disable: Collection[FastPath] = (FastPath.ADAPTIVE_DRAFTS,),
        quantize: Quantization | None = None,
        kernels: Kernels | None = None,
        runner: Any = None,
    ) -> None:
        """`runner`: one that is there already, with so many blocks; `model` is then not looked at."""
        if runner is None:
            loaded = adopt_model(copy.deepcopy(model) if copy_model else model)
            eos = eos_ids(loaded) if eos is None else eos
            runner = ModelRunner(loaded, num_blocks, block_size, eos, disable, quantize, kernels)
        self.eos = frozenset() if eos is None else eos
        self.runner = runner
        self.pool = BlockPool(num_blocks, block_size)
        self.residency = ResidencyManager(slots, 1 << 34)
        self.scheduler = Scheduler(self.pool, self.residency, max_batched_tokens, max_num_seqs)
        adaptive = FastPath.ADAPTIVE_DRAFTS not in disable
        costs = self.runner.row_costs(max_batched_tokens) if adaptive else None
        self.scheduler.drafting = drafting_of(
            costs, disable, cuts=isinstance(runner, ModelRunner) and runner.cuts_vocabulary
        )
        self.core = EngineCore(self.scheduler, self.residency, self.runner)
        self.adapters = dict(adapters or {})
        self.steps = 0
        self._next_id = 0

    def submit(self, job: Job) -> None:
        self._next_id += 1
        limit = job.params.max_tokens or 16
        job.sequence = Sequence(
            seq_id=self._next_id,
            tenant=job.tenant,
            params=job.params,
            tokens=list(job.prompt),
            prompt_len=len(job.prompt),
            max_total=len(job.prompt) + limit,
            eos_ids=self.eos,
            adapter=job.adapter,
            draft_cap=job.draft_cap,
        )
        self.core.add(job.sequence)

    def step(self) -> dict[int, tuple[Logprob, ...]]:
        outcome = self.core.step()
        self.steps += 1
        self.core.check_integrity()
        for digest in outcome.fetch:
            source = self.adapters[digest]
            weights = load_adapter(source) if isinstance(source, Path) else source
            self.core.adapter_ready(digest, self.runner.prepare_adapter(weights))
        return {e.seq_id: e.logprobs for e in outcome.emissions}

    def run(self, jobs: Rows[Job], after_step: Callable[[int], None] | None = None) -> list[list[int]]:
        """Run jobs to their ends, each submitted at its `start_step`; every block must be free afterwards."""
        pending = sorted(jobs, key=lambda j: j.start_step)
        by_id: dict[int, Job] = {}
        tick = 0
        while pending or self.core.has_work:
            while pending and pending[0].start_step <= tick:
                job = pending.pop(0)
                self.submit(job)
                assert job.sequence is not None
                by_id[job.sequence.seq_id] = job
            for seq_id, logprobs in self.step().items():
                by_id[seq_id].logprobs.extend(logprobs)
            if after_step is not None:
                after_step(tick)
            tick += 1
            assert tick < 20_000, "the engine makes no progress"
        assert self.pool.num_free == self.pool.num_blocks
        return [j.answer for j in jobs]

    def answer(self, prompt: Rows[int], params: SamplingParams, **job: Any) -> list[int]:
        return self.run([Job(prompt, params, **job)])[0]


@torch.inference_mode()
def oracle_greedy(
    model: Any, prompt: Rows[int], max_new_tokens: int, eos: int | None = None
) -> tuple[list[int], list[float]]:
    """transformers' own greedy answer (the end token included) and the top-2 gap at each position."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos if eos is not None else -1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    gaps = []
    for logits in out.logits:
        best = logits[0].float().topk(2).values
        gaps.append(float(best[0] - best[1]))
    return out.sequences[0, len(prompt) :].tolist(), gaps


def assert_same_tokens(ours: Rows[int], theirs: Rows[int], gaps: Rows[float], allowed_gap: float = 1e-4) -> None:
    """Token for token; a first difference is only excused where the oracle itself was within `allowed_gap` of a tie."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            assert gaps[i] < allowed_gap, f"token {i}: ours {a}, oracle {b}, gap {gaps[i]:.2e}"
            return
    assert len(ours) == len(theirs), f"lengths differ: ours {len(ours)}, oracle {len(theirs)}"
