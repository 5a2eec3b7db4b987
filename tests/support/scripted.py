"""A runner without a model: the next token is a pure function of the tokens, drafts are right as often as asked."""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows

from slipstream.engine.plan import BlockCopy, Pick, PlannedSequence, SequenceResult, StepPlan, StepResult


def next_token(tokens: Rows[int], vocab: int) -> int:
    """What follows these tokens."""
    return hash(tuple(tokens)) % vocab


class ScriptedRunner:
    """Keeps tokens as a KV cache would, block by block; fails loudly when the scheduler lets a cell go stale."""

    def __init__(self, block_size: int, vocab: int = 50, accept: float = 0.6, seed: int = 0) -> None:
        self.block_size = block_size
        self.vocab = vocab
        self.accept = accept
        self.cells: dict[tuple[int, int], int] = {}  # (block, offset) -> token whose KV is there
        self.random = random.Random(seed)
        self.tokens_per_step: list[int] = []

    def run(self, plan: StepPlan) -> StepResult:
        self.tokens_per_step.append(plan.num_tokens)
        self._copy(plan.copies)
        written: set[tuple[int, int]] = set()
        for part in plan.sequences:
            for i, token in enumerate(part.tokens):
                cell = self._cell(part, part.start + i)
                assert cell not in written, "two sequences write one KV cell in one step"
                written.add(cell)
                self.cells[cell] = token
        return StepResult({p.seq_id: self._decide(p) for p in plan.sequences if p.samples})

    def _copy(self, copies: Rows[BlockCopy]) -> None:
        assert len({copy.target for copy in copies}) == len(copies), "two copies go to one block"
        held = [[self.cells[copy.source, i] for i in range(self.block_size)] for copy in copies]
        for copy, tokens in zip(copies, held, strict=True):
            self.cells |= {(copy.target, i): token for i, token in enumerate(tokens)}

    def _cell(self, part: PlannedSequence, position: int) -> tuple[int, int]:
        return part.blocks[position // self.block_size], position % self.block_size

    def _context(self, part: PlannedSequence, end: int) -> list[int]:
        """What attention would read: the cells of the block table, not what the scheduler says."""
        return [self.cells[self._cell(part, p)] for p in range(end)]

    def _decide(self, part: PlannedSequence) -> SequenceResult:
        end = part.start + len(part.tokens) - part.num_drafts
        drafts = part.tokens[len(part.tokens) - part.num_drafts :]
        context = self._context(part, end)
        out = [next_token(context, self.vocab)]
        for draft in drafts:
            if draft != out[-1]:
                break
            context.append(draft)
            out.append(next_token(context, self.vocab))
        guess, future = [], [*context, out[-1]]
        for _ in range(part.draft_next):
            token = next_token(future, self.vocab)
            guess.append(token if self.random.random() < self.accept else (token + 1) % self.vocab)
            future.append(guess[-1])
        return SequenceResult(tuple(out), tuple(Pick(token, self.random.uniform(0.0, 10.0)) for token in guess))
