"""Rows and runs for tests of training: a tiny base model, small files, and options that finish in a second or two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from support.tiny_model import save_tiny_model

from slipstream.training.config import TrainingConfig
from slipstream.training.data import IGNORE, Encoded

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "bf16": False,
    "device": "cpu",
    "epochs": 1,
    "eval_every": 4,
    "gate_rows": 0,
    "lora_rank": 2,
    "max_length": 64,
    "save_every": 4,
    "stream_rank": 4,
    "streams": 2,
    "threads": 1,
}


def quick_config(base: Path, data: Path, output: Path, **changes: Any) -> TrainingConfig:
    """A run of few small steps in float32."""
    return TrainingConfig(base=str(base), data=data, output=output, **{**QUICK, **changes})


def save_sharp_model(folder: Path, **shape: Any) -> None:
    """`save_tiny_model` with larger embeddings and LM head: a frozen head as small as a random one could never be sure."""
    model = save_tiny_model(folder, **shape)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
        model.model.embed_tokens.weight.mul_(30)
    model.save_pretrained(folder)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def counting_rows(count: int, first: int = 0, digits: int = 8) -> list[dict[str, str]]:
    """A toy grammar whose answers follow from their prompts: from a letter on through the alphabet, round and round."""
    rows = []
    for i in range(first, first + count):
        letters = [chr(97 + (i + j) % 26) for j in range(digits + 1)]
        rows.append({"prompt": f"{chr(65 + i // 26 % 26)}:{letters[0]}>", "completion": "".join(letters[1:])})
    return rows


def random_encoded(lengths: Iterable[tuple[int, int]], vocab: int, seed: int = 0) -> list[Encoded]:
    """Rows of so many prompt and answer tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, answer in lengths:
        ids = torch.randint(vocab, (prompt + answer,), generator=generator).tolist()
        rows.append(Encoded(ids, [IGNORE] * prompt + ids[prompt:]))
    return rows
