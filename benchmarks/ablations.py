"""What decides the defaults of training: kinds of streams on one frozen LoRA, and how far they may move it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.report import table
from benchmarks.workload import SHARED
from slipstream.training import TrainingConfig, train
from slipstream.training.progress import TerminalObserver

FROZEN: Mapping[str, Mapping[str, Any]] = {
    "rank 32": {"stream_rank": 32, "conditioned": False},
    "rank 64": {"stream_rank": 64, "conditioned": False},
    "rank 128": {"stream_rank": 128, "conditioned": False},
    "dense": {"stream_rank": None, "conditioned": False},
    "rank 32, conditioned": {"stream_rank": 32},
    "rank 128, conditioned": {"stream_rank": 128},
    "rank 128, conditioned, hard targets": {"stream_rank": 128, "soft_targets": 0.0},
    "rank 128, conditioned, soft targets alone": {"stream_rank": 128, "soft_targets": 1.0},
    "rank 128, conditioned, whole vocabulary": {"stream_rank": 128, "negatives": None},
    "rank 128, conditioned, own answers": {"stream_rank": 128, "self_distill": True, "soft_targets": 1.0},
}
JOINT: Mapping[str, Mapping[str, Any]] = {f"gate {g}": {"gate": g} for g in (0.0, 0.1, 0.3, 1.0)}


def main(
    adapter: Annotated[Path, typer.Option(help="The LoRA whose streams are trained.")] = Path(
        "examples/adapters/snips"
    ),
    task: Annotated[str, typer.Option(help="A folder of the shared data.")] = "snips_slots",
    steps: Annotated[int, typer.Option(help="Optimiser steps of each variant.")] = 100,
    streams: Annotated[int, typer.Option(help="Streams of each variant.")] = 5,
    rows: Annotated[int, typer.Option(help="Held-out rows that each variant answers.")] = 48,
    joint: Annotated[bool, typer.Option(help="Compare gates, LoRA and streams together, instead.")] = False,
    only: Annotated[str, typer.Option(help="Only variants whose name holds this.")] = "",
) -> None:
    """Train every variant for the same steps on the same rows; report teacher-forced and served tokens per step."""
    torch.set_num_threads(2)
    method = {"method": "turbo_lora"} if joint else {"method": "turbo", "adapter": adapter, "self_distill": False}
    data = {"data": SHARED / "data" / task / "train.jsonl", "valid": SHARED / "data" / task / "valid.jsonl"}
    common = {
        **method, **data, "streams": streams, "max_steps": steps, "batch_size": 8, "learning_rate": 1e-3, "device": "cpu",
        "eval_every": steps, "eval_rows": 96, "save_every": 10 * steps, "gate_rows": rows, "distill_rows": 400,
    }  # fmt: skip
    found = []
    for name, options in (JOINT if joint else FROZEN).items():
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as scratch, TerminalObserver(Console(stderr=True), every=50) as observer:
            result = train(TrainingConfig.model_validate({**common, **options, "output": scratch}), observer)
        found.append(_row(name, result.metrics, result.to_json()["evaluation"], streams))
        print(json.dumps({"variant": name, **result.metrics}), flush=True)
    heads = [
        "variant",
        "LoRA loss",
        "top-1 of stream 0 / 1 / 2",
        "teacher-forced, K=3",
        f"K={streams}",
        f"served, K={streams}",
    ]
    print(table(heads, found))


def _row(name: str, metrics: Mapping[str, float], evaluation: Any, streams: int) -> list[str]:
    top1 = " / ".join(f"{metrics[f'eval_turbo_{k}_top1']:.2f}" for k in range(min(3, streams)))
    three = 1 + sum(metrics[f"eval_turbo_chain_{k}"] for k in range(min(3, streams)))
    served = next((v["tokens_per_step"] for n, v in (evaluation or {}).items() if n.startswith("turbo")), float("nan"))
    every = metrics["eval_expected_tokens"]
    return [name, f"{metrics['eval_lora_loss']:.4f}", top1, f"{three:.2f}", f"{every:.2f}", f"{served:.2f}"]
