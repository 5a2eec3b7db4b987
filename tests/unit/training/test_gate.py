"""Whether speculation pays, and whether the LoRA suffered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slipstream.evaluation.result import Evaluation, Spread, VariantResult
from slipstream.training.gate import METRICS, WORTH_IT, compare_with_lora, decide


def measured(speedup: float) -> Evaluation:
    slow = VariantResult(48, 0.5, 0.7, 1.0, (), 100.0, 960, 20.0)
    fast = VariantResult(48, 0.5, 0.7, 1.8, (0.6, 0.4), 100.0 * speedup, 960, 20.0, {"lora": Spread(speedup, 0.5, 9.0)})
    return Evaluation({"lora": slow, "turbo_lora": fast}, {})


def test_a_speculator_that_pays_is_on() -> None:
    gate = decide(measured(1.42), "turbo_lora", "lora")
    assert (gate.speculation, gate.expected_speedup) == (True, 1.42)
    assert gate.reason == "1.42 times as fast with speculation (1.80 tokens per step, 48 held-out rows)."


def test_one_that_does_not_is_off_and_says_why() -> None:
    gate = decide(measured(1.04), "turbo_lora", "lora")
    assert (gate.speculation, gate.expected_speedup) == (False, 1.04)
    assert gate.reason.startswith("Only 1.04 times as fast with speculation (1.80 tokens per step")
    assert gate.reason.endswith("below 1.1 it stays off.")


@pytest.mark.parametrize(("speedup", "on"), [(WORTH_IT, True), (WORTH_IT - 1e-9, False), (0.3, False), (4.0, True)])
def test_the_border(speedup: float, on: bool) -> None:
    assert decide(measured(speedup), "turbo_lora", "lora").speculation is on


def test_what_was_not_measured_is_on_and_says_so() -> None:
    assert decide(None, None, "base").reason == ""
    gate = decide(None, "turbo", "base")
    assert (gate.speculation, gate.expected_speedup) == (True, None)
    assert "Not measured" in gate.reason


def test_a_lora_is_compared_with_a_plain_one(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(json.dumps({"eval_lora_loss": 2.0}))
    assert compare_with_lora(2.0199, 0.1, tmp_path) == (
        "LoRA evaluation loss 2.0199, plain LoRA 2.0000 (+1.0%).",
        False,
    )
    text, warns = compare_with_lora(2.03, 0.1, tmp_path)
    assert warns
    assert text == "LoRA evaluation loss 2.0300, plain LoRA 2.0000 (+1.5%): worse than 1%. Train with a smaller gate."
    assert not compare_with_lora(1.5, 0.1, tmp_path)[1], "better is no reason to warn"


def test_without_a_plain_one_it_says_what_is_known() -> None:
    assert compare_with_lora(2.0, 0.0, None) == (
        "gate 0: the speculator leaves the LoRA exactly as plain LoRA training would make it.",
        False,
    )
    text, warns = compare_with_lora(2.0, 0.1, None)
    assert "give lora_reference" in text
    assert not warns
