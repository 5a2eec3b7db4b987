"""The numbers people watch, against numbers counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_model import save_tiny_model
from support.training import quick_config, random_encoded

from slipstream.training.metrics import named_metrics
from slipstream.training.model import build_model
from slipstream.training.packing import pack

# Ten trained positions; stream 0 has 8 targets, 6 of them right; stream 1 has 6, 4 of them right, 3 of them after a
# right stream 0.
SUMS = torch.tensor([20.0, 12.0, 9.0, 7.0, 6.0, 4.0, 10.0, 8.0, 6.0, 6.0, 3.0], dtype=torch.float64)


def test_every_number_by_hand() -> None:
    assert named_metrics(SUMS, 2, 0.5, chains=True) == pytest.approx(
        {
            "loss": (20 + 0.5 * 12 + 0.25 * 9) / 10,
            "lora_loss": 2.0,
            "lora_top1": 0.7,
            "turbo_0_loss": 1.5,
            "turbo_0_top1": 0.75,
            "turbo_0_cond": 0.6,
            "turbo_chain_0": 0.6,
            "turbo_1_loss": 1.5,
            "turbo_1_top1": 4 / 6,
            "turbo_1_cond": 0.5,
            "turbo_chain_1": 0.3,
            "expected_tokens": 1.9,
        }
    )


def test_without_chains_while_training() -> None:
    assert set(named_metrics(SUMS, 2, 0.5, chains=False)) == {
        "loss", "lora_loss", "lora_top1", "turbo_0_loss", "turbo_0_top1", "turbo_1_loss", "turbo_1_top1",
    }  # fmt: skip


def test_a_lora_alone_has_no_streams() -> None:
    found = named_metrics(torch.tensor([6.0, 2.0, 4.0], dtype=torch.float64), 0, 0.8, chains=True)
    assert found == {"loss": 1.5, "lora_loss": 1.5, "lora_top1": 0.5}


def test_nothing_right_and_nothing_at_all_divide_by_no_zero() -> None:
    never = named_metrics(torch.tensor([6.0, 2.0, 2.0, 1.0, 0.0, 0.0, 4.0, 3.0, 2.0, 0.0, 0.0]), 2, 0.8, chains=True)
    assert (never["turbo_0_cond"], never["turbo_1_cond"], never["expected_tokens"]) == (0.0, 0.0, 1.0)
    assert set(named_metrics(torch.zeros(11), 2, 0.8, chains=True).values()) == {0.0, 1.0}


def test_sums_of_a_real_pass_give_what_a_count_gives(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, layers=1)
    model = build_model(quick_config(tmp_path, tmp_path, tmp_path), tmp_path, 32).eval()
    rows = random_encoded([(2, 9), (3, 14)], 256)
    batch = pack(rows, 64, 256)
    with torch.no_grad():
        logits = model.causal(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[0].argmax(-1).tolist()
        found = named_metrics(model(**batch.as_dict()).stacked(), 2, 0.8, chains=True)
    ids, segments = batch.input_ids[0].tolist(), batch.segments[0].tolist()
    trained = [t for t in range(len(ids) - 1) if batch.labels[0, t + 1] != -100 and segments[t] == segments[t + 1]]
    # New streams say what the model says of the next token, about later ones.
    right = [
        [t for t in trained if segments[t + 2 + k : t + 3 + k] == [segments[t]] and logits[t] == ids[t + 2 + k]]
        for k in range(2)
    ]
    both = set(right[0]) & set(right[1])
    assert found["turbo_chain_0"] == pytest.approx(len(right[0]) / len(trained))
    assert found["expected_tokens"] == pytest.approx(1 + (len(right[0]) + len(both)) / len(trained))
    assert found["lora_top1"] == pytest.approx(sum(logits[t] == ids[t + 1] for t in trained) / len(trained))
