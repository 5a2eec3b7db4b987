"""llama.cpp as a peer: runs in a virtual environment of its own, takes one JSON line a run and answers with one.

`python llama_peer.py '{"model": gguf, "threads": 2, "prefix_caching": true}'`; then on standard input
`{"prompts": [[ids]], "tokens": n, "to_end": bool}` → `{"seconds": s, "tokens": n, "answers": [[ids]]}`. All prompts are one
batch; llama.cpp's own calls, no Python in between but the loop. With prefix caching, what a prompt shares with the one before
it is not computed again, as its server does.
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
MOST = 32  # sequences at once


class Llama:
    """One context of one model."""

    def __init__(self, model: str, threads: int, *, prefix_caching: bool) -> None:
        ll.llama_backend_init()
        self._model = ll.llama_model_load_from_file(model.encode(), ll.llama_model_default_params())
        options = ll.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_seq_max = CONTEXT, BATCH, MOST
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True
        self._context = ll.llama_init_from_model(self._model, options)
        self._vocab = ll.llama_model_get_vocab(self._model)
        self._greedy = ll.llama_sampler_init_greedy()
        self._batch = ll.llama_batch_init(BATCH, 0, 1)
        self._caches = prefix_caching
        self._held: list[int] = []  # the prompt of sequence 0

    def generate(self, prompts: list[list[int]], tokens: int, *, to_end: bool) -> list[list[int]]:
        """Greedy answers to all prompts."""
        answers: list[list[int]] = []
        for seq, prompt in enumerate(prompts):
            known = self._reuse(seq, prompt)
            self._decode([(token, i, seq) for i, token in enumerate(prompt) if i >= known])
            answers.append([ll.llama_sampler_sample(self._greedy, self._context, -1)])
        running = [seq for seq in range(len(prompts)) if not self._done(answers[seq], tokens, to_end=to_end)]
        while running:
            self._decode([(answers[s][-1], len(prompts[s]) + len(answers[s]) - 1, s) for s in running], every=True)
            for i, seq in enumerate(running):
                answers[seq].append(ll.llama_sampler_sample(self._greedy, self._context, i))
            running = [seq for seq in running if not self._done(answers[seq], tokens, to_end=to_end)]
        return answers

    def _reuse(self, seq: int, prompt: list[int]) -> int:
        """Leave what sequence 0 holds of a prompt in this one, and nothing else → how many tokens that is."""
        memory = ll.llama_get_memory(self._context)
        known = 0
        if self._caches:
            alike = (a == b for a, b in zip(prompt[:-1], self._held, strict=False))
            known = sum(takewhile(bool, alike))
        ll.llama_memory_seq_rm(memory, seq, 0 if seq else known, -1)
        if seq == 0:
            self._held = prompt
            for other in range(1, MOST):
                ll.llama_memory_seq_rm(memory, other, -1, -1)
        elif known:
            ll.llama_memory_seq_cp(memory, 0, seq, 0, known)
        return known

    def _decode(self, rows: list[tuple[int, int, int]], *, every: bool = False) -> None:
        """rows: (token, position, sequence); logits of the last one, or of each."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, seq) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
            batch.logits[i] = every or i == len(rows) - 1
        if ll.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _done(self, answer: list[int], tokens: int, *, to_end: bool) -> bool:
        return len(answer) >= tokens or (to_end and ll.llama_vocab_is_eog(self._vocab, answer[-1]))


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
