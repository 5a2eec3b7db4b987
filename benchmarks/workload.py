"""What every benchmark here runs: the default base model, real prompts, and eight distinct Turbo LoRAs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoTokenizer

from slipstream.adapters.load import load_adapter
from slipstream.adapters.weights import AdapterWeights
from slipstream.base_models import prepare_base_model
from slipstream.config import load_settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TASKS = {"snips": "snips_slots", "wikisql": "sql_wikisql"}
NUM_ADAPTERS = 8


def model_path() -> Path:
    """The default base model, prepared in the data folder."""
    return prepare_base_model("SmolLM2-135M-Instruct", load_settings().home).path


def adapter_folder(task: str) -> Path:
    """The demo Turbo LoRA of a task."""
    return ROOT / "examples" / "adapters" / task


def prompts(task: str, count: int | None = None, split: str = "test") -> list[str]:
    """The first rows of a task, or all of them."""
    with (SHARED / "data" / TASKS[task] / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in islice(lines, count)]


def prompt_ids(task: str, count: int | None = None, split: str = "test") -> list[list[int]]:
    """The same, tokenised."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    return [tokenizer(text)["input_ids"] for text in prompts(task, count, split)]


def perturbed(weights: AdapterWeights, seed: int, scale: float = 1e-3) -> AdapterWeights:
    """A distinct adapter of the same quality: each LoRA B moved by `scale` of its own size."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        path: replace(m, b=m.b + scale * m.b.abs().mean() * torch.randn(m.b.shape, generator=generator).to(m.b.dtype))
        for path, m in weights.lora.items()
    }
    return AdapterWeights(moved, weights.streams)


def eight_adapters(task: str = "snips") -> dict[str, AdapterWeights]:
    """Eight distinct Turbo LoRAs, by name."""
    weights = load_adapter(adapter_folder(task))
    return {f"{task}-{i}": perturbed(weights, i) if i else weights for i in range(NUM_ADAPTERS)}
