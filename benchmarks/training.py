"""Training speed: our `lora` beside TRL's SFTTrainer + PEFT on the same rows, and what `turbo_lora` costs on top."""

from __future__ import annotations

import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from adapter_registry.records import PromptFormat
from benchmarks.report import Series, ratio, table
from benchmarks.workload import SHARED, model_path
from slipstream.training.config import Method, TrainingConfig
from slipstream.training.data import Encoded, encode_rows, read_rows
from slipstream.training.events import Event, Metrics
from slipstream.training.model import build_model
from slipstream.training.trainer import TurboTrainer

RANK, ALPHA, RATE = 16, 32, 1e-3


@dataclass(frozen=True)
class Work:
    """The rows of one measurement, as text and as tokens."""

    path: Path
    rows: list[dict[str, str]]
    encoded: list[Encoded]
    batch: int
    steps: int

    def tokens(self, first: int, last: int) -> int:
        """Real tokens of steps first … last - 1, when rows come in order."""
        return sum(len(row.ids) for row in self.encoded[first * self.batch : last * self.batch])


def main(
    task: Annotated[str, typer.Option(help="A folder of the shared data.")] = "snips_slots",
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of a round; the first one is not counted.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds; the order of the sides rotates.")] = 3,
) -> None:
    """Tokens/s of training steps, sides interleaved, ratios round by round."""
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    path = model_path()
    lines = (SHARED / "data" / task / "train.jsonl").read_text("utf-8").splitlines()[: batch * steps]
    tokenizer = AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8")
        encoded, _ = encode_rows(tokenizer, read_rows(file), PromptFormat.RAW, 1024)
        work = Work(path, [json.loads(line) for line in lines], encoded, batch, steps)
        sides: dict[str, Callable[[], float]] = {
            "TRL SFTTrainer, sdpa": lambda: trl(work, "sdpa", scratch),
            "TRL SFTTrainer, eager": lambda: trl(work, "eager", scratch),
            "Slipstream lora": lambda: ours(work, Method.LORA, 3, scratch),
            "Slipstream turbo_lora, K=3": lambda: ours(work, Method.TURBO_LORA, 3, scratch),
            "Slipstream turbo_lora, K=5": lambda: ours(work, Method.TURBO_LORA, 5, scratch),
        }
        rates = measure(sides, rounds)
    best = max((name for name in sides if name.startswith("TRL")), key=lambda name: rates[name].median)
    print(table(["training tokens/s", "median (range)"], [[name, str(found)] for name, found in rates.items()]))
    pairs = [("Slipstream lora", best), *(("Slipstream lora", name) for name in sides if "turbo" in name)]
    ratios = [[f"{a} / {b}", ratio(rates[a], rates[b])] for a, b in pairs]
    print(table(["ratio of tokens/s, round by round", "median (range)"], ratios))


def measure(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, Series]:
    """Tokens/s of every side in every round."""
    rates = {name: Series() for name in sides}
    names = list(sides)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            rates[name].values.append(sides[name]())
            print(f"round {number + 1}: {name}: {rates[name].values[-1]:.0f} tokens/s", flush=True)
    return rates


def ours(work: Work, method: Method, streams: int, scratch: str) -> float:
    """One round of our trainer."""
    config = TrainingConfig(
        method=method, data=Path("rows.jsonl"), output=Path(scratch), device="cpu", streams=streams, max_steps=work.steps,
        epochs=1, batch_size=work.batch, lora_rank=RANK, lora_alpha=ALPHA, learning_rate=RATE, save_every=10_000,
    )  # fmt: skip
    marks: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, Metrics) and "train/loss" in event.data:
            marks.append(time.perf_counter())

    model = build_model(config, work.path, max(len(row.ids) for row in work.encoded))
    trainer = TurboTrainer(model, config, work.encoded, [], 0, watch, output=Path(scratch) / "ours")
    trainer.train()
    order = [len(work.encoded[row].ids) for i in range(1, work.steps) for row in trainer.train_dataset[i]]
    return sum(order) / (marks[-1] - marks[0])


def trl(work: Work, attention: str, scratch: str) -> float:
    """One round of TRL's trainer: bf16, completion-only loss, dynamic padding; PEFT's LoRA as ours."""
    from datasets import Dataset  # noqa: PLC0415 - only where the peer is installed
    from peft import LoraConfig  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    arguments = SFTConfig(
        output_dir=f"{scratch}/trl", per_device_train_batch_size=work.batch, max_steps=work.steps, learning_rate=RATE,
        bf16=True, use_cpu=True, completion_only_loss=True, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, max_length=1024,
        packing=False,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(work.path, dtype=torch.bfloat16, attn_implementation=attention)
    marks = _Marks()
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(work.rows), peft_config=lora, callbacks=[marks],
        processing_class=AutoTokenizer.from_pretrained(work.path),
    )  # fmt: skip
    trainer.train()
    # Both trainers shuffle; every row has been seen once, the first step's share is taken out on average.
    tokens = work.tokens(0, work.steps) * (work.steps - 1) / work.steps
    return tokens / (marks.times[-1] - marks.times[0])


class _Marks(TrainerCallback):  # type: ignore[misc]
    """The end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())
