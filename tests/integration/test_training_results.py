"""What a training run is for: drafts that are right, a gate that knows when they are not, and rows that need care."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.shared import shared_path
from support.training import counting_rows, quick_config, write_jsonl
from support.training_world import World
from transformers import AutoTokenizer

from adapter_registry.records import PromptFormat
from slipstream.adapters.load import load_adapter
from slipstream.adapters.validate import inspect_adapter
from slipstream.engine.loader import describe, load_model
from slipstream.errors import InvalidRequest
from slipstream.training.events import Event, Message, Metrics
from slipstream.training.run import train


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- what it is for -----------------------------------------------------------------------------------------------


def test_a_toy_grammar_is_drafted_nearly_perfectly(world: World) -> None:
    rows = counting_rows(26 * 5, digits=16)
    held_out = rows[::5]  # prompts of the same kind that nobody has seen
    data = write_jsonl(world.root / "toy.jsonl", [row for row in rows if row not in held_out])
    write_jsonl(world.valid, held_out)
    result = world.run(
        data=data, epochs=12, batch_size=8, lora_rank=16, learning_rate=0.01, stream_learning_rate=0.01, streams=3,
        stream_rank=16, eval_every=1000, save_every=1000, gate_rows=26, gate=0.1,
    )  # fmt: skip
    weights = load_adapter(result.folder)
    prompts = [row["prompt"] for row in held_out]
    served = world.answer(weights, 3, prompts, max_tokens=40)
    assert served.answers == world.answer(weights, 0, prompts, max_tokens=40).answers
    assert min(served.acceptance) > 0.8, served.acceptance
    assert result.gate.speculation or result.gate.expected_speedup is not None
    # The evaluator counts every position, the engine every step, and near the end fewer drafts have a target.
    for k, share in enumerate(served.acceptance):
        assert share == pytest.approx(result.metrics[f"eval_turbo_{k}_top1"], abs=0.12)
    assert served.tokens_per_step == pytest.approx(result.metrics["eval_expected_tokens"], rel=0.2)


def test_a_speculator_that_does_not_pay_is_off(world: World) -> None:
    # Streams that have learned nothing: one step, at a rate that moves nothing.
    result = world.run(
        method="turbo", self_distill=False, max_steps=1, stream_learning_rate=1e-9, gate_rows=8, streams=8
    )
    assert result.evaluation is not None
    assert result.evaluation.variants["turbo"].tokens_per_step < 2.0
    gate = result.gate
    assert (gate.speculation, "it stays off" in gate.reason) == (False, True), gate
    assert "Speculation **off**" in (result.folder / "training_card.md").read_text()
    assert any(
        event.level == "warning" and event.message == gate.reason
        for event in world.events
        if isinstance(event, Message)
    )


# --- rows that need care ------------------------------------------------------------------------------------------


def test_held_out_rows_that_do_not_fit_are_not_answered(world: World) -> None:
    # The tiny model's context is 256 tokens: a run must not fail at its very end.
    write_jsonl(world.valid, [{"prompt": "a" * 300, "completion": "b"}, *counting_rows(3)])
    result = world.run(max_steps=1, gate_rows=4)
    assert result.evaluation is not None
    assert result.evaluation.variants["lora"].rows == 3


def test_validation_rows_must_have_the_form_of_the_training_rows(world: World) -> None:
    write_jsonl(world.valid, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with pytest.raises(InvalidRequest, match="prompt_format raw needs prompt and completion"):
        world.run(max_steps=1)


def test_chats(world: World) -> None:
    chats = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
             for r in counting_rows(12)]  # fmt: skip
    write_jsonl(world.valid, chats[:4])
    result = world.run(data=write_jsonl(world.root / "chats.jsonl", chats), gate_rows=4)
    spec = describe(
        load_model(str(world.base), "float32", "cpu"),
        "tiny",
        str(world.base),
        AutoTokenizer.from_pretrained(world.base),
    )
    assert inspect_adapter(result.folder, spec).prompt_format is PromptFormat.CHAT


def test_without_validation_rows_some_are_held_out(world: World) -> None:
    config = quick_config(world.base, world.data, world.root / "run", max_steps=1)
    train(config, world.events.append)
    assert "No validation file: 1 rows, drawn by the seed, are held out." in [
        e.message for e in world.events if isinstance(e, Message)
    ]


def test_fewer_rows_than_a_batch(world: World) -> None:
    result = world.run(data=write_jsonl(world.root / "few.jsonl", counting_rows(3)), batch_size=16, epochs=2)
    assert result.steps == 2


# --- the real model -----------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.timeout(1500)
def test_a_few_steps_on_the_real_model(tmp_path: Path) -> None:
    lines = shared_path("data", "snips_slots", "train.jsonl").read_text().splitlines()[:196]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:192]))
    (tmp_path / "valid.jsonl").write_text("\n".join(lines[192:]))
    from support.real_model import smollm2_path  # noqa: PLC0415

    events: list[Event] = []
    config = quick_config(
        smollm2_path(), tmp_path / "train.jsonl", tmp_path / "run", valid=tmp_path / "valid.jsonl", bf16=None,
        batch_size=16, max_length=256, lora_rank=16, stream_rank=64, streams=3, threads=None, eval_every=12, save_every=12,
        stream_learning_rate=4e-3, learning_rate=1e-3, conditioned=True,
    )  # fmt: skip
    result = train(config, events.append)
    losses = [e.data["train/lora_loss"] for e in events if isinstance(e, Metrics) and "train/lora_loss" in e.data]
    top1 = [e.data["train/turbo_0_top1"] for e in events if isinstance(e, Metrics) and "train/turbo_0_top1" in e.data]
    assert result.steps == len(losses) == 12
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert sum(top1[-3:]) / 3 > 0.2
