"""The card, the curve and the log that travel with a version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from slipstream.evaluation.result import Evaluation, Spread, VariantResult
from slipstream.training.config import Method, TrainingConfig
from slipstream.training.gate import Gate
from slipstream.training.report import CARD, LOG, PICTURE, Report, card, thinned, write_report

HASH = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
HISTORY: list[dict[str, float]] = [
    {"step": 1, "loss": 9.0, "lora_loss": 3.21987, "turbo_0_top1": 0.1, "turbo_1_top1": 0.05, "learning_rate": 5e-4},
    {"step": 2, "loss": 8.0, "lora_loss": 2.5, "turbo_0_top1": 0.3, "turbo_1_top1": 0.1},
    {"step": 2, "eval_loss": 8.1, "eval_lora_loss": 2.6, "eval_turbo_0_top1": 0.25, "eval_turbo_1_top1": 0.12},
]


def report(**changes: Any) -> Report:
    slow = VariantResult(48, 0.5, 0.71, 1.0, (), 100.0, 960, 20.0)
    fast = VariantResult(48, 0.5, 0.71, 1.83, (0.61, 0.42), 140.0, 960, 20.0, {"lora": Spread(1.4, 1.3, 1.5)})
    config = TrainingConfig(
        data=Path("/secret/home/train.jsonl"),
        output=Path("/secret/out"),
        base="/secret/base",
        name="sql",
        streams=2,
        seed=17,
    )
    whole = Report(
        config, "org/model", "raw", {"training": ("train.jsonl", HASH, 1234)}, 2, 5678, 90.0, HISTORY,
        {"eval_lora_loss": 2.6, "eval_turbo_0_top1": 0.25, "epoch": 1.0},
        Evaluation({"lora": slow, "turbo_lora": fast}, {}), Gate(True, "1.40 times as fast.", 1.4),
        "LoRA evaluation loss 2.6.", ("3 rows were left out.",),
    )  # fmt: skip
    return replace(whole, **changes)


def test_the_card_says_how_it_was_made() -> None:
    text = card(report())
    assert text.startswith("# sql: turbo_lora\n")
    for fact in (
        "Base model `org/model`, prompt format **raw**",
        "2 optimiser steps, 5678 tokens, 1.5 minutes",
        "Speculation **on**. 1.40 times as fast.",
        "LoRA: LoRA evaluation loss 2.6.",
        "Note: 3 rows were left out.",
        f"| training | train.jsonl | 1234 | `{HASH}` |",
        "| turbo_lora | 50.0% | 0.710 | 1.83 | 0.61 0.42 | 140 | 48 |",
        "| lora | 50.0% | 0.710 | 1.00 | - | 100 | 48 |",
        "| `eval_lora_loss` | 2.6000 |",
        "![learning curve](learning_curve.png)",
    ):
        assert fact in text
    assert "/secret" not in text, "where it was made is nobody's business"
    config = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    assert (config["seed"], config["streams"], config["method"], config["learning_rate"]) == (17, 2, "turbo_lora", 5e-4)


def test_a_card_without_what_there_is_not() -> None:
    config = report().config.model_copy(update={"method": Method.LORA, "name": None})
    text = card(report(config=config, evaluation=None, metrics={}, lora="", notes=(), gate=Gate(False, "")))
    assert text.startswith("# Adapter: lora\n")
    assert "Speculation **off**.\n" in text
    for absent in ("held-out rows", "teacher-forced", "Note:", "LoRA: "):
        assert absent not in text


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1], []], ids=["whole", "one-step", "empty"])
@pytest.mark.parametrize("method", [Method.LORA, Method.TURBO_LORA])
def test_picture_and_log(tmp_path: Path, history: list[dict[str, float]], method: Method) -> None:
    config = report().config.model_copy(update={"method": method})
    write_report(report(history=history, config=config), tmp_path)
    with Image.open(tmp_path / PICTURE) as picture:
        picture.verify()
        assert picture.format == "PNG"
        assert picture.size > (600, 200)
    assert (tmp_path / PICTURE).stat().st_size < 100_000
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines() if line]
    assert len(lines) == len(history)
    for line, row in zip(lines, history, strict=True):
        assert line == pytest.approx(row, rel=1e-3)
    assert HASH in (tmp_path / CARD).read_text()


def test_a_long_log_is_thinned_but_keeps_its_evaluations() -> None:
    history: list[dict[str, float]] = []
    for step in range(1, 1051):
        history.append({"step": step, "loss": 1.0})
        if step % 50 == 0:
            history.append({"step": step, "eval_loss": 2.0})
    kept = thinned(history)
    steps = [row["step"] for row in kept if "loss" in row]
    assert (len(steps), steps[0], steps[-1]) == (97, 1, 1050)
    assert sum("eval_loss" in row for row in kept) == 21
    assert thinned(history[:60]) == history[:60], "a short one is whole"
