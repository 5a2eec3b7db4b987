"""Self-distillation: the model's own answers to the training prompts, for its speculator to learn (methods.md 1.4, phase B).

A draft is accepted when it is what the model would say, not what the data says. Only ever for streams with the LoRA
frozen: nothing learns its own mistakes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from slipstream.adapters.load import load_adapter
from slipstream.engine.loader import LoadedModel, eos_ids
from slipstream.engine.offline import OfflineEngine, RowResult
from slipstream.engine.offline import Row as EngineRow
from slipstream.errors import InvalidRequest
from slipstream.protocol import SamplingParams
from slipstream.training.data import IGNORE, Encoded
from slipstream.training.events import Metrics, Observer

CONCURRENCY = 32
_NAME = "adapter"


def distil(
    loaded: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path | None,
    prompts: Sequence[list[int]],
    max_length: int,
    observer: Observer,
    *,
    max_answer: int | None = None,
    max_seconds: float | None = None,
) -> list[Encoded]:
    """Greedy answers of a base model with `adapter` (a folder, or None) to `prompts` (token ids), as rows to train on.

    A row has at most `max_length` tokens, `max_answer` (default: half as many) of them the answer's; longer prompts are
    left out.
    An answer that was cut off is kept as far as it goes: every position of it is the model's own. After `max_seconds` no
    further prompt is begun. Raises `InvalidRequest` when no prompt is short enough.
    """
    adapters = {} if adapter is None else {_NAME: load_adapter(adapter)}
    # The tokenizer's end token too: it is what training rows end with.
    engine = OfflineEngine(loaded, adapters=adapters, eos=eos_ids(loaded, tokenizer))
    room = min(engine.max_length, max_length)
    fitting = [p for p in prompts if len(p) < room]
    if not fitting:
        raise InvalidRequest(f"Every prompt has {room} tokens or more. Raise max_length.", param="max_length")
    done = 0
    began = time.monotonic()

    def progress() -> float:
        by_time = (time.monotonic() - began) / max_seconds if max_seconds else 0.0
        return min(1.0, max(done / len(fitting), by_time))

    def finished(index: int, result: RowResult) -> None:
        nonlocal done
        done += 1
        observer(Metrics(done, None if max_seconds else len(fitting), progress(), {}))

    def requests() -> Iterator[EngineRow]:
        for number, prompt in enumerate(fitting):
            if number >= CONCURRENCY and progress() >= 1.0:
                return
            params = SamplingParams(temperature=0.0, max_tokens=min(max_answer or max_length // 2, room - len(prompt)))
            yield EngineRow(prompt, params, None if adapter is None else _NAME)

    results = engine.run(requests(), finished, concurrency=CONCURRENCY).results
    return [
        Encoded([*prompt, *result.tokens], [IGNORE] * len(prompt) + list(result.tokens))
        for prompt, result in zip(fitting, results, strict=False)
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
