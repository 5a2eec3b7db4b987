"""What decides the defaults of training: kinds of streams on one frozen LoRA, and how far they may move it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import set_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from adapter_registry.records import PromptFormat
from benchmarks.report import table
from benchmarks.workload import SHARED, model_path
from slipstream.adapters.load import load_adapter
from slipstream.adapters.peft_config import PEFT_TENSORS
from slipstream.engine.loader import load_model
from slipstream.training import TrainingConfig
from slipstream.training.config import Method
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
}
GATES = (0.0, 0.15, 1.0)
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
    adapter: Annotated[Path, typer.Option(help="The Turbo LoRA that goes on being trained.")] = _ADAPTER,
    task: Task = "snips_slots",
    steps: Annotated[int, typer.Option(help="Optimiser steps of each variant, 8 rows each.")] = 50,
    valid: Annotated[int, typer.Option(help="Validation rows.")] = 96,
    only: Only = "",
) -> None:
    """LoRA and streams together, from a trained pair on: what the streams' gradient gains them, and costs the LoRA."""
    torch.set_num_threads(2)
    tokenizer, base = AutoTokenizer.from_pretrained(model_path()), model_path()
    rows, held_out = (
        encode_rows(tokenizer, read_rows(SHARED / "data" / task / f"{name}.jsonl"), PromptFormat.RAW, 1024)[0]
        for name in ("train", "valid")
    )
    trained = load_adapter(adapter).streams
    assert trained is not None
    assert trained.a is not None
    count = trained.num_streams
    found: list[list[str]] = []
    for gate in GATES:
        name = f"gate {gate}"
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as scratch, TerminalObserver(Console(stderr=True), every=10) as observer:
            config = TrainingConfig(
                method=Method.TURBO_LORA, data=Path("rows.jsonl"), output=Path(scratch), streams=count, gate=gate,
                stream_rank=trained.a.shape[1], max_steps=steps, batch_size=8, learning_rate=3e-4, gate_warmup=0.0,
                stream_learning_rate=1e-3, device="cpu", save_every=10_000, eval_every=10_000, eval_rows=valid, seed=3,
            )  # fmt: skip
            model = build_model(config, base, max(len(row.ids) for row in rows))
            set_peft_model_state_dict(model.base, load_file(adapter / PEFT_TENSORS))
            assert model.streams is not None
            assert model.streams.start_from(trained)
            trainer = TurboTrainer(model, config, rows, held_out, 0, observer, output=Path(scratch))
            if not found:
                found.append(["before", *_lora_numbers(trainer.measure(), count)])
            trainer.train()
            metrics = trainer.measure()
        print(json.dumps({"variant": name, **metrics}), flush=True)
        found.append([name, *_lora_numbers(metrics, count)])
    print(table(["variant", "LoRA loss", "LoRA top-1", *_heads(count)], found))


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
        assert len(answers) == len(prompts) + len(held_out), "every prompt is short enough"
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


def _lora_numbers(metrics: Mapping[str, float], count: int) -> list[str]:
    return [f"{metrics['lora_loss']:.4f}", f"{metrics['lora_top1']:.1%}", *_numbers(metrics, count)]


def _heads(count: int) -> list[str]:
    return ["top-1 of stream 0 / 1 / 2", "tokens/step, K=3", f"K={count}"]


def _numbers(metrics: Mapping[str, float], count: int) -> list[str]:
    top1 = " / ".join(f"{metrics[f'turbo_{k}_top1']:.3f}" for k in range(min(3, count)))
    return [top1, *(f"{metrics[f'expected_tokens_{k}']:.2f}" for k in (min(3, count), count))]
