"""Self-distillation: the model's own answers to the training prompts, for its speculator to learn (methods.md 1.4, phase B).

A draft is accepted when it is what the model would say, not what the data says. Only ever for streams with the LoRA
frozen: nothing learns its own mistakes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from slipstream.adapters.load import load_adapter
from slipstream.engine.offline import OfflineEngine, RowResult
from slipstream.engine.offline import Row as EngineRow
from slipstream.protocol import SamplingParams
from slipstream.training.data import IGNORE, Encoded
from slipstream.training.events import Metrics, Observer

CONCURRENCY = 32
_NAME = "adapter"


def distil(
    base: Path, adapter: Path | None, prompts: Sequence[list[int]], max_tokens: int, dtype: str, observer: Observer
) -> list[Encoded]:
    """Greedy answers of `base` with `adapter` (a folder, or None) to `prompts` (token ids), as rows to train on.

    An answer that was cut off by `max_tokens` is kept as far as it goes: every position of it is the model's own.
    """
    engine = OfflineEngine(base, dtype, {} if adapter is None else {_NAME: load_adapter(adapter)})
    done = 0

    def finished(index: int, result: RowResult) -> None:
        nonlocal done
        done += 1
        observer(Metrics(done, len(prompts), done / len(prompts), {}))

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    name = None if adapter is None else _NAME
    fitting = [p for p in prompts if len(p) < engine.max_length]
    outcome = engine.run([EngineRow(p, params, name) for p in fitting], finished, concurrency=CONCURRENCY)
    return [
        Encoded([*prompt, *result.tokens], [IGNORE] * len(prompt) + list(result.tokens))
        for prompt, result in zip(fitting, outcome.results, strict=True)
    ]


def save_rows(rows: Sequence[Encoded], path: Path) -> None:
    """Keep them: a resumed run must not answer everything again."""
    lines = [json.dumps({"ids": row.ids, "labels": row.labels}) for row in rows]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def load_rows(path: Path) -> list[Encoded]:
    """Read `save_rows`' file."""
    return [Encoded(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
