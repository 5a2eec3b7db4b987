"""Base weights in int8 and int4 beside full precision: speed, bytes, and what becomes of the answers."""

from __future__ import annotations

import json
from itertools import cycle
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from benchmarks.engine import CONCURRENCY, Kind, Turn, slipstream
from benchmarks.report import table
from benchmarks.results import Results
from benchmarks.workload import SHARED, TASKS, adapter_folder, model_path, prompt_ids
from slipstream.adapters.load import load_adapter
from slipstream.engine.offline import OfflineEngine, Outcome, Row
from slipstream.engine.quantized import Quantization
from slipstream.protocol import SamplingParams

FULL = "full precision"


def answers(engine: OfflineEngine, rows: int) -> Outcome:
    """The demo adapter's answers to test rows, to their ends, with its own drafts."""
    params = SamplingParams(temperature=0.0, max_tokens=96)
    return engine.run([Row(ids, params, "snips", 3) for ids in prompt_ids("snips", rows)], concurrency=4)


def expected(rows: int) -> list[str]:
    """What the test rows should say."""
    with (SHARED / "data" / TASKS["snips"] / "test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(next(lines))["completion"].strip() for _ in range(rows)]


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length of the speed rows.")] = 32,
    rows: Annotated[int, typer.Option(help="Test rows answered.")] = 48,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
) -> None:
    """int8 and int4 base weights beside full precision."""
    torch.set_num_threads(threads)
    adapter = {"snips": load_adapter(adapter_folder("snips"))}
    kinds: dict[str, Quantization | None] = {FULL: None, "int8": Quantization.INT8, "int4": Quantization.INT4}
    engines = {
        name: OfflineEngine(model_path(), "auto", adapter, device="cpu", quantize=kind) for name, kind in kinds.items()
    }
    results = Results("quantized", "SmolLM2-135M, base linears kept in", CONCURRENCY)
    prompts = cycle(prompt_ids("snips"))
    with typer.progressbar(length=(rounds + 1) * len(CONCURRENCY) * len(engines), label="Measuring") as bar:
        for round_ in range(rounds + 1):
            for n in CONCURRENCY:
                turn = Turn.of(n, prompts)
                for name, engine in engines.items():
                    measured = slipstream(engine, tokens, Kind.BASE)(turn)
                    bar.update(1)
                    if round_:
                        results.add(name, n, *measured)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    wanted, found = expected(rows), {name: answers(engine, rows) for name, engine in engines.items()}
    lines = []
    for name, outcome in found.items():
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in outcome.answers]
        right = sum(a == b for a, b in zip(texts, wanted, strict=True))
        same = sum(a == b for a, b in zip(outcome.answers, found[FULL].answers, strict=True))
        lines.append([name, f"{right / rows:.1%}", f"{same} / {rows}", f"{outcome.tokens_per_step:.2f}"])
    command = f"python -m benchmarks quantized --rounds {rounds} --tokens {tokens} --rows {rows}"
    print("\n" + results.write([("int8", FULL), ("int4", FULL)], {"command": command}))
    print(table(["snips demo, test rows", "exact match", "same answer as full", "tokens/step, K=3"], lines))
