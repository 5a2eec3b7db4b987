"""A scheduler whose adapters are always there, and runs of it to the end."""

from __future__ import annotations

from support.scripted import ScriptedRunner, next_token

from slipstream.engine.blocks import BlockPool
from slipstream.engine.leases import AdapterLease
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence
from slipstream.protocol import SamplingParams

BLOCK = 4


class AlwaysThere:
    """Every adapter is resident, with three streams."""

    def __init__(self) -> None:
        self.pins = 0

    def try_pin(self, digest: str) -> AdapterLease | None:
        self.pins += 1
        return AdapterLease(0, 3)

    def unpin(self, digest: str) -> None:
        self.pins -= 1


def make_scheduler(num_blocks: int = 32, budget: int = 32, seqs: int = 8) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, BLOCK), AlwaysThere(), budget, seqs)


def make_seq(seq_id: int, prompt: list[int], max_tokens: int = 8, **kwargs: object) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    seq = Sequence(seq_id, "t", params, list(prompt), len(prompt), len(prompt) + max_tokens, frozenset({0}))
    for name, value in kwargs.items():
        setattr(seq, name, value)
    return seq


def run(scheduler: Scheduler, runner: ScriptedRunner, limit: int = 2000) -> None:
    for _ in range(limit):
        if not scheduler.has_work:
            return
        plan = scheduler.schedule()
        scheduler.commit(plan, runner.run(plan))
        scheduler.check_integrity()
    raise AssertionError("no progress")


def expected_answer(prompt: list[int], max_tokens: int, vocab: int = 50, eos: int = 0) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens, vocab))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]
