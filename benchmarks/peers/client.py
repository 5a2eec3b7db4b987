"""The near ends of `vllm_peer.py` and `llama_peer.py`: a peer in a process of its own, asked for one run at a time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peers.install import LLAMA, VLLM, default_gguf


@dataclass(frozen=True, slots=True)
class PeerRun:
    """What a run gave."""

    seconds: float
    tokens: int
    answers: list[list[int]]


class Peer:
    """A process that answers runs."""

    def __init__(self, python: Path, script: str, spec: Mapping[str, Any], threads: int) -> None:
        """Starts it and waits until it is ready. Raises `RuntimeError` when it does not come up."""
        self._script = script
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name(script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._read()

    def run(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], tokens: int, *, to_end: bool
    ) -> PeerRun:
        """Greedy answers to all prompts at once."""
        assert self._process.stdin is not None
        request = {"prompts": list(map(list, prompts)), "adapters": list(adapters), "tokens": tokens, "to_end": to_end}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return PeerRun(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._script} ended with {self._process.wait()}; is it set up (make bench-peers)?")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def __enter__(self) -> Peer:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def vllm(
    model: Path,
    dtype: str,
    adapters: Mapping[str, Path] | None = None,
    *,
    ngram: bool = False,
    prefix_caching: bool,
    threads: int = 2,
) -> Peer:
    """vLLM with a base model and perhaps adapters (name → PEFT folder)."""
    spec = {"model": str(model), "dtype": dtype, "ngram": ngram, "prefix_caching": prefix_caching}
    return Peer(
        VLLM.python, "vllm_peer.py", {**spec, "adapters": {n: str(p) for n, p in (adapters or {}).items()}}, threads
    )


def llama(threads: int = 2, *, prefix_caching: bool) -> Peer:
    """llama.cpp with the default base model as it comes: 4 bits a weight."""
    spec = {"model": str(default_gguf()), "threads": threads, "prefix_caching": prefix_caching}
    return Peer(LLAMA.python, "llama_peer.py", spec, threads)
