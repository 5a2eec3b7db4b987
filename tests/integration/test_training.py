"""Whole runs on a tiny base model: every method, seeds, resuming, stopping, trackers, and what is served afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.training import counting_rows, write_jsonl
from support.training_world import World
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_registry.records import AdapterKind, PromptFormat
from slipstream.adapters.load import load_adapter
from slipstream.adapters.save import export_lorax
from slipstream.adapters.validate import inspect_adapter
from slipstream.engine.loader import describe, load_model, pick_dtype
from slipstream.engine.offline import OfflineEngine
from slipstream.engine.offline import Row as EngineRow
from slipstream.errors import InvalidRequest
from slipstream.protocol import SamplingParams
from slipstream.training import run as run_module
from slipstream.training.config import Method
from slipstream.training.distill import CONCURRENCY
from slipstream.training.events import Event, Message, Metrics
from slipstream.training.gate import METRICS
from slipstream.training.model import TRAINABLE, TurboModel
from slipstream.training.phase import read_outcome
from slipstream.training.states import StateCache

FILES = {"training_card.md", "learning_curve.png", "training_log.jsonl"}


PROMPTS = [row["prompt"] for row in counting_rows(8, first=24)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def finished_lora(world: World) -> Path:
    """A LoRA that was trained before."""
    return world.run("finished", method="lora", epochs=2, learning_rate=0.05).folder


CASES: dict[str, tuple[AdapterKind, dict[str, Any]]] = {
    "lora": (AdapterKind.LORA, {}),
    "turbo_lora": (AdapterKind.TURBO_LORA, {"gate": 0.1}),
    "turbo": (AdapterKind.TURBO, {}),
    "turbo-on-adapter": (AdapterKind.TURBO_LORA, {}),
    "medusa": (AdapterKind.MEDUSA, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_method_makes_an_adapter_that_can_be_served(
    world: World, case: str, request: pytest.FixtureRequest
) -> None:
    kind, options = CASES[case]
    if case == "turbo-on-adapter":
        options = {"adapter": request.getfixturevalue("finished_lora")}
    method = Method(case.removesuffix("-on-adapter"))
    result = world.run(method=method, epochs=4, learning_rate=0.02, stream_learning_rate=0.02, self_distill=False,
                       gate_rows=4, **options)  # fmt: skip
    losses = world.losses("train/loss" if method.trains_lora else "train/turbo_0_loss")
    assert result.steps == len(losses) == 24
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    if not method.trains_lora:
        lm = world.losses("eval/lora_loss")
        assert len(lm) == 6
        assert max(lm) - min(lm) < 1e-6, "the model itself does not move"

    spec = describe(
        load_model(str(world.base), "float32", "cpu"),
        "tiny",
        str(world.base),
        AutoTokenizer.from_pretrained(world.base),
    )
    found = inspect_adapter(result.folder, spec)
    assert (found.kind, found.base_digest, found.prompt_format) == (kind, spec.base_digest, PromptFormat.RAW)
    assert found.num_streams == (2 if method.trains_streams else 0)
    assert {file.path for file in found.attachments} == FILES
    assert not found.warnings
    assert result.evaluation is not None
    if method.trains_streams:
        fast = next(v for k, v in result.evaluation.variants.items() if k in ("turbo", "turbo_lora", "medusa"))
        assert len(found.acceptance) == 2
        assert found.acceptance[: len(fast.acceptance)] == pytest.approx(fast.acceptance)

    weights = load_adapter(result.folder)
    plain, drafted = (world.answer(weights, drafts, PROMPTS) for drafts in (0, 2))
    assert plain.answers == drafted.answers
    assert plain.answers != world.answer(None, 0, PROMPTS).answers or kind in (AdapterKind.TURBO, AdapterKind.MEDUSA)


def test_the_card_tells_what_was_done(world: World) -> None:
    result = world.run(gate_rows=4)
    text = (result.folder / "training_card.md").read_text()
    for fact in (
        "# toy: turbo_lora",
        "| training | train.jsonl | 24 |",
        "| validation | valid.jsonl | 8 |",
        '"seed": 0',
    ):
        assert fact in text
    assert str(world.root) not in text
    assert json.loads((world.root / "run" / METRICS).read_text()) == result.metrics
    assert {
        "eval_lora_loss",
        "eval_turbo_0_cond",
        "eval_turbo_chain_1",
        "eval_expected_tokens",
    } <= result.metrics.keys()


def test_the_last_evaluation_is_of_what_is_exported(world: World) -> None:
    # Six steps, an evaluation every four: the numbers of the card are those of step six.
    result = world.run(eval_every=4)
    rows = [json.loads(line) for line in (result.folder / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 6]
    again = world.run("other", eval_every=6)
    assert again.metrics["eval_lora_loss"] == pytest.approx(result.metrics["eval_lora_loss"])


# --- files --------------------------------------------------------------------------------------------------------


def test_exported_weights_are_the_trained_ones(world: World) -> None:
    result = world.run(learning_rate=0.01)
    trained = world.weights()
    weights = load_adapter(result.folder)
    assert len(weights.lora) == 2 * 7
    for path, module in weights.lora.items():
        prefix = f"base.base_model.model.{path}"
        for ours, theirs in ((module.a, "lora_A"), (module.b, "lora_B")):
            assert torch.equal(ours.float(), trained[f"{prefix}.{theirs}.default.weight"].bfloat16().float()), path
            assert ours.any()
        assert module.scale == 32 / 2
    streams = weights.streams
    assert streams is not None
    assert streams.c is not None
    for name, mine in (("a", streams.a), ("b", streams.b), ("bias", streams.bias)):
        assert mine is not None
        assert torch.equal(mine.float(), trained[f"streams.{name}"].bfloat16().float())
    ratio = streams.c.float() / trained["streams.c"]  # the scale of the embeddings is folded in
    assert ratio.min() > 0
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.median())), rtol=0.02, atol=0)


@pytest.mark.parametrize("rank", [4, None], ids=["low-rank", "dense"])
def test_unconditioned_streams_travel_through_the_lorax_layout(world: World, rank: int | None) -> None:
    result = world.run(conditioned=False, stream_rank=rank, stream_learning_rate=0.02)
    export_lorax(result.folder, world.root / "lorax")
    own, other = load_adapter(result.folder), load_adapter(world.root / "lorax")
    assert own.streams is not None
    assert other.streams is not None
    assert other.streams.weight is not None
    if rank is None:
        assert own.streams.weight is not None
        assert torch.equal(own.streams.weight, other.streams.weight)
    else:
        assert own.streams.a is not None
        assert own.streams.b is not None
        product = (own.streams.b.float() @ own.streams.a.float()).bfloat16()
        assert torch.equal(product, other.streams.weight)
    assert torch.equal(own.streams.bias, other.streams.bias)
    assert own.lora.keys() == other.lora.keys()
    assert all(torch.equal(own.lora[p].a, other.lora[p].a) for p in own.lora)
    assert world.answer(own, 2, PROMPTS).answers == world.answer(other, 2, PROMPTS).answers


def test_peft_reads_the_lora_and_answers_alike(world: World) -> None:
    result = world.run(method="lora", epochs=2, learning_rate=0.02)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, str(result.folder)).eval()
    ours = world.answer(load_adapter(result.folder), 0, PROMPTS[:3]).answers
    for prompt, answer in zip(PROMPTS[:3], ours, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        theirs = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert theirs[0, ids.shape[1] :].tolist() == answer


# --- the same run again -------------------------------------------------------------------------------------------


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_seed_repeats(world: World) -> None:
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        world.run(name, seed=seed, lora_dropout=0.1, max_steps=4)
    assert equal(world.weights("one"), world.weights("two"))
    assert not equal(world.weights("one"), world.weights("three"))


class Stop(Exception):
    """The power went."""


def stop_after(step: int) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == step:
            raise Stop

    return watch


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"method": "medusa", "self_distill": False}], ids=str)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(world: World, options: dict[str, Any]) -> None:
    options = {"epochs": 2, "lora_dropout": 0.2, "gate": 0.2, "save_every": 4, **options}
    world.run("whole", **options)
    with pytest.raises(Stop):
        world.run("parts", stop_after(6), **options)
    assert not (world.root / "parts" / "adapter").exists()
    result = world.run("parts", resume=True, **options)
    assert "Going on from checkpoint-4." in [event.message for event in world.events if isinstance(event, Message)]
    steps = [event.step for event in world.events if isinstance(event, Metrics) and "train/loss" in event.data]
    assert steps == list(range(5, 13))
    assert result.steps == 12
    assert equal(world.weights("whole"), world.weights("parts"))


def test_resuming_a_finished_run_only_exports_again(world: World) -> None:
    first = world.run(max_steps=4)
    before = {p.name: p.read_bytes() for p in first.folder.iterdir() if p.suffix == ".safetensors"}
    again = world.run(max_steps=4, resume=True)
    assert world.losses() == []
    assert (again.steps, again.metrics) == (first.steps, first.metrics)
    assert {p.name: p.read_bytes() for p in first.folder.iterdir() if p.suffix == ".safetensors"} == before


def test_a_folder_that_holds_a_run_is_not_written_over(world: World) -> None:
    world.run(max_steps=2)
    with pytest.raises(InvalidRequest, match="holds a run already"):
        world.run(max_steps=2)


def test_micro_batches_change_nothing(world: World) -> None:
    losses, ends = [], []
    for name, size in (("whole", None), ("micro", 2)):
        world.run(name, batch_size=8, micro_batch_size=size, epochs=2, learning_rate=0.005, negatives=None, gate=0.3)
        losses.append([*world.losses("train/loss"), *world.losses("eval/loss")])
        ends.append(world.weights(name))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, tensor in ends[0].items():
        apart = (tensor - ends[1][name]).abs().max()
        assert apart < 0.02 * tensor.abs().max() + 1e-3, name


def test_a_closed_gate_trains_the_lora_that_lora_training_makes(world: World) -> None:
    options: dict[str, Any] = {"epochs": 2, "learning_rate": 0.01, "lora_dropout": 0.1}
    lora = world.run("lora", method="lora", **options)
    turbo = world.run("turbo", gate=0.0, lora_reference=world.root / "lora", **options)
    assert turbo.metrics["eval_lora_loss"] == pytest.approx(lora.metrics["eval_lora_loss"], rel=1e-4)
    assert "LoRA evaluation loss" in (turbo.folder / "training_card.md").read_text()
    alone, joint = world.weights("lora"), world.weights("turbo")
    for name, tensor in alone.items():
        assert (tensor - joint[name]).abs().max() < 0.01 * tensor.abs().max() + 1e-3, name


def test_early_stopping_keeps_the_best(world: World) -> None:
    # So fast that it gets worse soon: held-out rows with answers of their own.
    write_jsonl(world.valid, [{"prompt": f"{i}", "completion": f"{i * 7919 % 997}zq"} for i in range(6)])
    result = world.run(method="lora", epochs=20, learning_rate=0.3, eval_every=2, patience=2)
    losses = {event.step: event.data["eval/lora_loss"] for event in world.events
              if isinstance(event, Metrics) and "eval/lora_loss" in event.data}  # fmt: skip
    best = min(losses, key=lambda step: losses[step])
    assert result.steps == best + 4 < 120
    assert any("Stopped early: 2 evaluations" in event.message for event in world.events if isinstance(event, Message))
    assert equal(
        world.weights(), load_file(world.root / "run" / "phase" / "checkpoints" / f"checkpoint-{best}" / TRAINABLE)
    )
    assert result.metrics["eval_lora_loss"] == pytest.approx(losses[best]), "the numbers of what is kept"


def test_early_stopping_judges_the_streams_of_a_finished_lora_by_their_own_loss(world: World) -> None:
    # In the second phase the LoRA stands still: by its loss the first evaluation would always be the best.
    result = world.run(
        self_distill=True, epochs=1, distill_epochs=6, eval_every=6, patience=2, stream_learning_rate=0.01
    )
    outcome = read_outcome(world.root / "run" / "phase-distilled")
    assert outcome is not None
    losses = [row["eval_loss"] for row in outcome.history if "eval_loss" in row]
    assert result.metrics["eval_loss"] == min(losses)
    told = [event.message for event in world.events if isinstance(event, Message) and "Stopped" in event.message]
    assert len(losses) == 6 or f"without a lower loss than {min(losses):.4f}" in told[-1]


def test_a_resumed_run_keeps_its_number_format(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run(bf16=None, max_steps=2)
    config = json.loads((world.root / "run" / "run.json").read_text())
    assert config["bf16"] is (pick_dtype("auto", torch.device("cpu")) is torch.bfloat16)
    monkeypatch.setattr(run_module, "precision", lambda config: torch.float16)  # as if on another machine
    assert world.run(bf16=None, max_steps=2, resume=True).steps == 2


def test_trackers_get_the_names_people_know(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    result = world.run(report_to=("tensorboard",))
    folders = {path.parent for path in (world.root / "run").rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    found = EventAccumulator(str(folders.pop()))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"train/loss", "train/lora_loss", "train/turbo_0_loss", "train/turbo_1_loss", "train/turbo_0_top1",
            "eval/lora_loss", "eval/turbo_0_cond", "eval/turbo_chain_1", "eval/expected_tokens"} <= tags  # fmt: skip
    assert [e.value for e in found.Scalars("train/lora_loss")] == pytest.approx(world.losses(), rel=1e-5)
    assert len(found.Scalars("train/loss")) == result.steps


def test_a_frozen_trunk_reads_each_row_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    read_states = TurboModel.read_states

    def counting(model: TurboModel, **batch: torch.Tensor) -> list[torch.Tensor]:
        found = read_states(model, **batch)
        read.append(len(found))
        return found

    monkeypatch.setattr(TurboModel, "read_states", counting)
    options: dict[str, Any] = {"method": "turbo", "self_distill": False, "epochs": 4, "stream_learning_rate": 0.02}
    kept = world.run("kept", **options)
    assert sum(read) == 24 + 8  # training and validation rows
    monkeypatch.setattr(StateCache, "states", lambda cache, numbers: cache._read(numbers))
    again = world.run("again", **options)
    assert sum(read) > 4 * 32
    assert kept.metrics == pytest.approx(again.metrics, rel=1e-3)
    for name, tensor in world.weights("again").items():
        torch.testing.assert_close(world.weights("kept")[name], tensor, rtol=1e-3, atol=1e-4)


# --- two phases ---------------------------------------------------------------------------------------------------


def test_a_second_phase_learns_the_models_own_answers(world: World) -> None:
    result = world.run(self_distill=True, epochs=2, distill_epochs=1, learning_rate=0.02, lora_dropout=0.1)
    answers = [json.loads(line) for line in (world.root / "run" / "distilled.jsonl").read_text().splitlines()]
    assert len(answers) == 24
    first, second = world.weights(), world.weights(phase="phase-distilled")
    assert {name for name in first if name.startswith("streams.")} == set(second), "the LoRA stays"
    assert any(not torch.equal(first[name], second[name]) for name in second)
    # The streams go on from where they were: nearer to that than to the start.
    assert (second["streams.b"] - first["streams.b"]).norm() < first["streams.b"].norm()
    assert result.steps == 12 + 6
    weights = load_adapter(result.folder)
    path = "model.layers.0.self_attn.q_proj"
    trained = first[f"base.base_model.model.{path}.lora_A.default.weight"]
    assert torch.equal(weights.lora[path].a.float(), trained.bfloat16().float())

    # And what they learned is what this LoRA says.
    def prompt_of(row: dict[str, Any]) -> list[int]:
        return [i for i, label in zip(row["ids"], row["labels"], strict=True) if label == -100]

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    asked = [tokenizer(row["prompt"])["input_ids"] for row in counting_rows(24)]
    assert sorted(map(prompt_of, answers)) == sorted(asked)
    row, prompt = answers[3], prompt_of(answers[3])
    engine = OfflineEngine(world.base, "float32", {"it": weights}, device="cpu")
    answer = row["ids"][len(prompt) :]
    params = SamplingParams(temperature=0.0, max_tokens=len(answer))
    assert engine.run([EngineRow(prompt, params, "it")]).answers[0] == answer


def test_answering_stops_when_its_time_is_over(world: World) -> None:
    data = write_jsonl(world.root / "many.jsonl", counting_rows(3 * CONCURRENCY))
    options: dict[str, Any] = {"method": "turbo", "data": data, "max_minutes": 1e-4, "epochs": 50}
    result = world.run(**options)
    answers = (world.root / "run" / "distilled.jsonl").read_text().splitlines()
    assert len(answers) == CONCURRENCY, "what was begun is finished, and nothing more is begun"
    assert result.steps >= 1
    world.run("few", method="turbo", data=data, max_steps=2)
    answers = (world.root / "few" / "distilled.jsonl").read_text().splitlines()
    assert len(answers) == 2 * 4, "no more than the steps will see"


def test_a_model_that_does_not_stop_is_not_listened_to_for_long(world: World) -> None:
    # One step at a rate that moves nothing: a random model, whose answers end only where they are cut off.
    result = world.run(max_steps=1, learning_rate=1e-9, stream_learning_rate=1e-9, gate_rows=8)
    assert result.evaluation is not None
    longest = len(counting_rows(1)[0]["completion"]) + 1  # the end token
    assert result.evaluation.variants["lora"].mean_completion_tokens == 2 * longest
