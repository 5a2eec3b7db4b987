"""llama.cpp as a peer: runs in a virtual environment of its own, takes one JSON line a run and answers with one.

`python llama_peer.py '{"model": gguf, "threads": 2, "prefix_caching": true}'`; then on standard input
`{"prompts": [[ids]], "tokens": n, "to_end": bool}` → `{"seconds": s, "tokens": n, "answers": [[ids]]}`. All prompts are one
batch; llama.cpp's own calls, no Python in between but the loop. With prefix caching, what a prompt shares with one of the run
before is not computed again, as its server does with the slot that fits best.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import takewhile
from typing import Any

import llama_cpp as ll

CONTEXT = 32 * 512  # tokens of all sequences together
BATCH = 512
MOST = 32  # prompts at once; those of the run before stay until what is alike has been copied


class Llama:
    """One context of one model."""

    def __init__(self, model: str, threads: int, *, prefix_caching: bool) -> None:
        ll.llama_backend_init()
        self._model = ll.llama_model_load_from_file(model.encode(), ll.llama_model_default_params())
        options = ll.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_seq_max = CONTEXT, BATCH, 2 * MOST
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True
        self._context = ll.llama_init_from_model(self._model, options)
        self._vocab = ll.llama_model_get_vocab(self._model)
        self._greedy = ll.llama_sampler_init_greedy()
        self._batch = ll.llama_batch_init(BATCH, 0, 1)
        self._caches = prefix_caching
        self._held: dict[int, list[int]] = {}  # prompts by sequence, of the run before
        self._known: dict[int, int] = {}  # of these sequences, tokens that need not be computed

    def generate(self, prompts: list[list[int]], tokens: int, *, to_end: bool) -> list[list[int]]:
        """Greedy answers to all prompts."""
        seqs = self._begin(prompts)
        answers = [[first] for first in self._prefill(prompts, seqs)]
        running = [i for i, answer in enumerate(answers) if not self._done(answer, tokens, to_end=to_end)]
        while running:
            rows = [(answers[i][-1], len(prompts[i]) + len(answers[i]) - 1, seqs[i], True) for i in running]
            for i, token in zip(running, self._decode(rows), strict=True):
                answers[i].append(token)
            running = [i for i in running if not self._done(answers[i], tokens, to_end=to_end)]
        return answers

    def _begin(self, prompts: list[list[int]]) -> list[int]:
        """Sequences for the prompts, which hold what is known of these and nothing else."""
        memory, old = ll.llama_get_memory(self._context), self._held
        first = 0 if any(seq >= MOST for seq in old) else MOST
        self._held = {first + i: prompt for i, prompt in enumerate(prompts)}
        self._known = {}
        for seq, prompt in self._held.items():
            alike = {other: _shared(prompt[:-1], held) for other, held in old.items()} if self._caches else {}
            best = max(alike, key=alike.__getitem__, default=-1)
            self._known[seq] = alike.get(best, 0)
            if self._known[seq]:
                ll.llama_memory_seq_cp(memory, best, seq, 0, self._known[seq])
        for seq in old:
            ll.llama_memory_seq_rm(memory, seq, -1, -1)
        return list(self._held)

    def _prefill(self, prompts: list[list[int]], seqs: list[int]) -> list[int]:
        """The first token of each answer; as many prompts at a time as a batch takes."""
        found: list[int] = []
        batch: list[tuple[int, int, int, bool]] = []
        for seq, prompt in zip(seqs, prompts, strict=True):
            known, last = self._known[seq], len(prompt) - 1
            rows = [(token, i, seq, i == last) for i, token in enumerate(prompt) if i >= known]
            if len(batch) + len(rows) > BATCH:
                found += self._decode(batch)
                batch = []
            batch += rows
        return found + self._decode(batch)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """rows: (token, position, sequence, whether what comes next is asked) → the likeliest tokens of those that are."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, seq, asked) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
            batch.logits[i] = asked
        if ll.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        asked_rows = [i for i, row in enumerate(rows) if row[3]]
        return [ll.llama_sampler_sample(self._greedy, self._context, i) for i in asked_rows]

    def _done(self, answer: list[int], tokens: int, *, to_end: bool) -> bool:
        return len(answer) >= tokens or (to_end and ll.llama_vocab_is_eog(self._vocab, answer[-1]))


def _shared(prompt: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    return sum(takewhile(bool, (a == b for a, b in zip(prompt, other, strict=False))))


def main() -> None:
    """Serve runs until standard input ends."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever llama.cpp prints is no reply
    llama = Llama(spec["model"], spec["threads"], prefix_caching=spec["prefix_caching"])
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        run = json.loads(line)
        began = time.perf_counter()
        answers = llama.generate(run["prompts"], run["tokens"], to_end=run["to_end"])
        reply = {"seconds": time.perf_counter() - began, "tokens": sum(map(len, answers)), "answers": answers}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
