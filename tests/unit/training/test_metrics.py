"""The numbers people watch, against numbers counted by hand."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import save_tiny_model
from support.training import quick_config, random_encoded

from slipstream.training.metrics import named_metrics
from slipstream.training.model import ForwardSums, build_model
from slipstream.training.objective import find_chains, find_positions
from slipstream.training.packing import pack

# Ten trained positions; stream 0 has 8 targets, 6 of them right; stream 1 has 6, 4 of them right. After a right stream 0
# stream 1 has 5 targets, 3 of them right. A walk with one stream takes 6 steps, with both 5.
SUMS = torch.tensor([20.0, 12, 9, 7, 6, 4, 10, 8, 6, 8, 5, 6, 3, 6, 5], dtype=torch.float64)


def test_every_number_by_hand() -> None:
    assert named_metrics(SUMS, 2, 0.5, chains=True) == pytest.approx(
        {
            "loss": (20 + 0.5 * 12 + 0.25 * 9) / 10,
            "lora_loss": 2.0,
            "lora_top1": 0.7,
            "turbo_0_loss": 1.5,
            "turbo_0_top1": 0.75,
            "turbo_0_cond": 0.75,
            "turbo_chain_0": 0.75,
            "turbo_1_loss": 1.5,
            "turbo_1_top1": 4 / 6,
            "turbo_1_cond": 0.6,
            "turbo_chain_1": 0.5,
            "expected_tokens_1": 10 / 6,
            "expected_tokens_2": 2.0,
            "expected_tokens": 2.0,
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
    never = named_metrics(torch.tensor([6.0, 2, 2, 1, 0, 0, 4, 3, 2, 3, 0, 0, 0, 4, 4]), 2, 0.8, chains=True)
    assert (never["turbo_0_cond"], never["turbo_1_cond"], never["expected_tokens"]) == (0.0, 0.0, 1.0)
    assert set(named_metrics(ForwardSums.zeros(2), 2, 0.8, chains=True).values()) == {0.0}


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
    targets = [[t for t in trained if segments[t + 2 + k : t + 3 + k] == [segments[t]]] for k in range(2)]
    both = set(right[0]) & set(right[1])
    assert found["turbo_chain_0"] == found["turbo_0_cond"] == pytest.approx(len(right[0]) / len(targets[0]))
    assert found["turbo_chain_1"] == pytest.approx(len(both) / len(targets[1]))
    assert found["turbo_1_cond"] == pytest.approx(len(both) / max(1, len(set(right[0]) & set(targets[1]))))
    assert found["lora_top1"] == pytest.approx(sum(logits[t] == ids[t + 1] for t in trained) / len(trained))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_walk_takes_the_steps_that_an_engine_takes(lengths: list[int], streams: int, random: Random) -> None:
    """Answers of so many tokens, one after the other; draft k of answer token i is right or wrong."""
    verdicts = [[[random.random() < 0.7 for _ in range(length)] for length in lengths] for _ in range(streams)]
    rows = [torch.tensor([0, *range(1, length + 1)]) for length in lengths]  # a prompt token, then the answer
    labels = torch.cat([row.masked_fill(row == 0, -100) for row in rows]).unsqueeze(0)
    segments = torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)]).unsqueeze(0)
    positions = find_positions(labels, segments, streams + 1)
    correct = torch.tensor([[right for answer in line for right in answer] for line in verdicts])
    correct &= torch.stack([positions.has_target(k) for k in range(streams)])
    for used in range(1, streams + 1):
        steps = 0
        for number, length in enumerate(lengths):
            done, steps = 1, steps + 1  # prefill
            while done < length:
                drafts = [verdicts[k][number][done - 1] for k in range(min(used, length - done))]
                accepted = (*drafts, False).index(False)
                done = min(length, done + accepted + 1)
                steps += 1
        assert int(find_chains(correct, positions, walk=True).steps[used - 1]) == steps
