"""What decides the defaults of training: kinds of streams on one frozen LoRA, and how far they may move it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer

from adapter_registry.records import PromptFormat
from benchmarks.report import table
from benchmarks.workload import SHARED, model_path
from slipstream.engine.loader import load_model
from slipstream.training import TrainingConfig, train
from slipstream.training.data import Encoded, encode_prompt, encode_rows, read_rows
from slipstream.training.distill import distil
from slipstream.training.model import build_model
from slipstream.training.progress import TerminalObserver
from slipstream.training.states import StateCache
from slipstream.training.trainer import TurboTrainer

OWN = "own answers"
FROZEN: Mapping[str, Mapping[str, Any]] = {
    "rank 128, conditioned, own answers": {},
    "rank 128, conditioned, the data's answers": {},
    "own answers, half soft": {"soft_targets": 0.5},
    "own answers, hard targets": {"soft_targets": 0.0},
    "rank 256, conditioned, own answers": {"stream_rank": 256},
    "dense, own answers": {"stream_rank": None, "conditioned": False},
    "rank 64, conditioned, own answers": {"stream_rank": 64},
    "rank 32, conditioned, own answers": {"stream_rank": 32},
    "rank 128, own answers": {"conditioned": False},
    "twice the rate, own answers": {"stream_learning_rate": 4e-3},
    "equal weights, own answers": {"stream_decay": 1.0},
    "512 negatives, own answers": {"negatives": 512},
}
GATES = (0.0, 0.1, 0.3, 1.0)
_ADAPTER = Path("examples/adapters/snips")

Task = Annotated[str, typer.Option(help="A folder of the shared data.")]
Streams = Annotated[int, typer.Option(help="Streams of each variant.")]
Only = Annotated[str, typer.Option(help="Only variants whose name holds this.")]


def streams(
    adapter: Annotated[Path, typer.Option(help="The LoRA whose streams are trained.")] = _ADAPTER,
    task: Task = "snips_slots",
    steps: Annotated[int, typer.Option(help="Optimiser steps of each variant, 16 rows each.")] = 100,
    rows: Annotated[int, typer.Option(help="Training rows.")] = 600,
    valid: Annotated[int, typer.Option(help="Validation rows.")] = 96,
    count: Streams = 8,
    only: Only = "",
) -> None:
    """Streams alone, on one frozen LoRA. Tokens per step are walks through the LoRA's own answers to validation prompts."""
    torch.set_num_threads(2)
    bench = _Bench(adapter, task, rows, valid)
    found = []
    for name, options in FROZEN.items():
        if only not in name:
            continue
        defaults = {"soft_targets": 1.0, "streams": count, "max_steps": steps, "batch_size": 16}
        metrics = bench.train(OWN in name, {**defaults, **options})
        print(json.dumps({"variant": name, **metrics}), flush=True)
        found.append([name, *_numbers(metrics, count)])
    print(table(["variant", *_heads(count)], found))


def gates(
    task: Task = "snips_slots",
    steps: Annotated[int, typer.Option(help="Optimiser steps of each variant, 8 rows each.")] = 60,
    rows: Annotated[int, typer.Option(help="Held-out rows that each variant answers.")] = 48,
    count: Streams = 6,
    only: Only = "",
) -> None:
    """LoRA and streams together, the streams' gradient into the LoRA let through more or less."""
    torch.set_num_threads(2)
    data = {"data": SHARED / "data" / task / "train.jsonl", "valid": SHARED / "data" / task / "valid.jsonl"}
    common = {
        "method": "turbo_lora", **data, "streams": count, "max_steps": steps, "batch_size": 8, "learning_rate": 1e-3,
        "device": "cpu", "eval_every": steps, "eval_rows": 96, "save_every": 10 * steps, "gate_rows": rows,
        "self_distill": False,
    }  # fmt: skip
    found = []
    for gate in GATES:
        name = f"gate {gate}"
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as scratch, TerminalObserver(Console(stderr=True), every=20) as observer:
            result = train(TrainingConfig.model_validate({**common, "gate": gate, "output": scratch}), observer)
        print(json.dumps({"variant": name, **result.metrics}), flush=True)
        assert result.evaluation is not None
        served = result.evaluation.variants["turbo_lora"]
        metrics = {key.removeprefix("eval_"): value for key, value in result.metrics.items()}
        text = [f"{metrics['lora_loss']:.4f}", f"{served.exact_match:.1%}"]
        found.append([name, *text, *_numbers(metrics, count), f"{served.tokens_per_step:.2f}"])
    print(table(["variant", "LoRA loss", "exact match", *_heads(count), f"served, K={count}"], found))


class _Bench:
    """One frozen LoRA and its rows; every variant sees the same, and the trunk reads each row once for all of them."""

    def __init__(self, adapter: Path, task: str, rows: int, valid: int) -> None:
        self._adapter, self._base = adapter, model_path()
        self._tokenizer = AutoTokenizer.from_pretrained(self._base)
        folder = SHARED / "data" / task
        self._caches: dict[bool, StateCache | None] = {}
        read = read_rows(folder / "train.jsonl")[:rows]
        self._rows = {False: encode_rows(self._tokenizer, read, PromptFormat.RAW, 1024)[0]}
        prompts = [encode_prompt(self._tokenizer, row, PromptFormat.RAW) for row in read]
        held_out = [
            encode_prompt(self._tokenizer, row, PromptFormat.RAW) for row in read_rows(folder / "valid.jsonl")[:valid]
        ]
        with TerminalObserver(Console(stderr=True), every=100) as observer:
            loaded = load_model(str(self._base), "auto", "cpu")
            answers = distil(loaded, self._tokenizer, adapter, [*prompts, *held_out], 512, observer)
        self._rows[True], self._valid = answers[: len(prompts)], answers[len(prompts) :]

    def train(self, own: bool, options: Mapping[str, Any]) -> dict[str, float]:
        """One variant; what it measures in the end."""
        rows: Sequence[Encoded] = self._rows[own]
        with tempfile.TemporaryDirectory() as scratch, TerminalObserver(Console(stderr=True), every=50) as observer:
            config = TrainingConfig.model_validate(
                {"method": "turbo", "adapter": self._adapter, "data": Path("rows.jsonl"), "output": scratch, "epochs": 100,
                 "device": "cpu", "save_every": 10_000, "eval_every": 10_000, "eval_rows": len(self._valid), **options}
            )  # fmt: skip
            model = build_model(config, self._base, max(len(row.ids) for row in [*rows, *self._valid]))
            trainer = TurboTrainer(model, config, rows, self._valid, 0, observer, output=Path(scratch))
            trainer.states = self._caches.setdefault(own, trainer.states)
            trainer.train()
            return trainer.measure()


def _heads(count: int) -> list[str]:
    return ["top-1 of stream 0 / 1 / 2", "tokens/step, K=3", f"K={count}"]


def _numbers(metrics: Mapping[str, float], count: int) -> list[str]:
    top1 = " / ".join(f"{metrics[f'turbo_{k}_top1']:.3f}" for k in range(min(3, count)))
    return [top1, *(f"{metrics[f'expected_tokens_{k}']:.2f}" for k in (min(3, count), count))]
