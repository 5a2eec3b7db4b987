"""The model that is trained: identity at the start, packs that change nothing, a gate, and what moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from support.adapters import random_peft_adapter
from support.tiny_model import save_tiny_model
from support.training import quick_config, random_encoded

from slipstream.errors import InvalidRequest, ModelUnsupported
from slipstream.training import model as model_module
from slipstream.training.data import Encoded
from slipstream.training.model import TRAINABLE, ForwardSums, TurboModel, build_model
from slipstream.training.packing import pack

ROWS = random_encoded([(5, 9), (3, 12), (1, 1), (0, 7), (8, 4)], 256)
ITEMS = sum(row.num_trained for row in ROWS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, layers=2)
    return folder


def build(base: Path, longest: int = 20, noise: float = 0.2, **options: Any) -> TurboModel:
    """A model in float64 whose trainable weights are no longer those of the start."""
    config = quick_config(base, base / "none.jsonl", base / "out", negatives=None, **options)
    model = build_model(config, base, longest).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.train()


def forward(model: TurboModel, rows: list[Encoded], length: int = 64, items: int = ITEMS) -> ForwardSums:
    return model(**pack(rows, length, pad_id=256).as_dict(), num_items=items)  # type: ignore[no-any-return]


def backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def gradients(model: TurboModel) -> dict[str, torch.Tensor]:
    """Every gradient, taken off the model."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, rtol: float, atol: float) -> None:
    assert a.keys() == b.keys()
    assert a
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "options", [{}, {"conditioned": False}, {"conditioned": False, "stream_rank": None}, {"method": "medusa"}], ids=str
)
def test_a_new_speculator_says_what_the_model_says(base: Path, options: dict[str, Any]) -> None:
    model = build(base, noise=0.0, **options)
    h = torch.randn(11, 32, dtype=torch.float64)
    ids = torch.randint(256, (11,))
    states = model._stream_states(h, ids)
    assert states is not None
    assert states.shape == (2, 11, 32)
    assert torch.equal(states, h.expand(2, -1, -1)), "bit for bit"
    # And it can learn: gradients reach what is zero at the start.
    backward(forward(model, ROWS).loss)
    found = gradients(model)
    zero = [n for n, p in model.named_parameters() if n.startswith("streams.") and not p.any()]
    assert zero
    assert all(found[name].any() for name in zero)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_packed_rows_do_not_see_each_other(
    base: Path, attention: str, gate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "sdpa":
        monkeypatch.setattr(model_module, "EAGER_UP_TO", 0)
    model = build(base)
    model.gate = gate
    assert model.causal.config._attn_implementation == attention
    tolerance = 1e-6 if attention == "eager" else 1e-12  # transformers' eager attention has its softmax in float32
    alone = [forward(model, [row], length=1) for row in ROWS]
    backward(torch.stack([out.loss for out in alone]).sum())
    expected = gradients(model)
    for length in (1, 20, 33, 64):  # from two rows a pack to all in one, with padding
        out = forward(model, ROWS, length)
        torch.testing.assert_close(out.stacked(), torch.stack([a.stacked() for a in alone]).sum(0), rtol=1e-7, atol=0)
        backward(out.loss)
        same(gradients(model), expected, rtol=0, atol=tolerance)


def lora_gradients(model: TurboModel) -> dict[str, torch.Tensor]:
    return {n: g for n, g in gradients(model).items() if n.startswith("base.")}


def test_a_closed_gate_leaves_the_lora_its_own_gradients(base: Path) -> None:
    lora = build(base, method="lora")
    turbo = build(base)
    turbo.load_state_dict(lora.state_dict(), strict=False)
    backward(forward(lora, ROWS).loss)
    alone = lora_gradients(lora)
    for gate in (0.0, 0.1, 1.0):
        turbo.gate = gate
        backward(forward(turbo, ROWS).loss)
        joint = lora_gradients(turbo)
        assert joint.keys() == alone.keys()
        apart = max(float((joint[n] - alone[n]).abs().max()) for n in alone)
        assert apart < 1e-12 if gate == 0 else apart > 1e-4 * gate, (gate, apart)


def test_the_gate_scales_what_the_streams_ask_of_the_lora(base: Path) -> None:
    model = build(base)
    found = {}
    for gate in (0.0, 0.25, 1.0):
        model.gate = gate
        backward(forward(model, ROWS).loss)
        found[gate] = lora_gradients(model)
    for name in found[0.0]:
        whole = found[1.0][name] - found[0.0][name]
        torch.testing.assert_close(found[0.25][name] - found[0.0][name], 0.25 * whole, rtol=0, atol=1e-6)
        assert whole.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("method", "moves"),
    [("lora", {"lora"}), ("turbo_lora", {"lora", "streams"}), ("turbo", {"streams"}), ("medusa", {"streams"})],
)
def test_only_what_is_trained_moves(base: Path, method: str, moves: set[str]) -> None:
    model = build(base, method=method)
    kinds = {"streams" if n.startswith("streams.") else "lora" if "lora_" in n else n
             for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    assert kinds == moves
    assert {"lora"} & moves == ({"lora"} if any(True for _ in model.lora_parameters()) else set())
    backward(forward(model, ROWS).loss)
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if p.requires_grad} == set(model.trainable_state())


@pytest.mark.parametrize("method", ["turbo", "medusa"])
def test_an_existing_lora_is_used_and_frozen(base: Path, tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    random_peft_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path, lora_dropout=0.5)
    plain = build(base, noise=0.0, method=method)
    tuned = build(base, noise=0.0, method=method, adapter=tmp_path)
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {
        n for n, p in plain.named_parameters() if p.requires_grad
    }
    # The LoRA's answers are what the streams learn, without the noise of a dropout that nobody trains with.
    first, again = forward(tuned, ROWS), forward(tuned, ROWS)
    assert torch.equal(first.losses, again.losses)
    assert not torch.allclose(first.losses[0], forward(plain, ROWS).losses[0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # 5.23's new name
def test_gradient_checkpointing_changes_no_gradient(base: Path) -> None:
    found = []
    for on in (False, True):
        torch.manual_seed(3)
        model = build(base, gradient_checkpointing=on, lora_dropout=0.2)
        model.gate = 0.5
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) is on
        torch.manual_seed(4)
        backward(forward(model, ROWS).loss)
        found.append(gradients(model))
    same(found[0], found[1], rtol=1e-10, atol=1e-13)


def test_drafts_over_part_of_the_vocabulary_only_while_training(base: Path) -> None:
    model = build(base).eval()
    config = model._options.model_copy(update={"negatives": 5})
    model._options = config
    model.limit_drafts(torch.tensor(sorted({i for row in ROWS for i in row.labels if i >= 0})))
    whole = forward(model, ROWS)
    torch.testing.assert_close(whole.stacked(), forward(build(base).eval(), ROWS).stacked())
    model.train()
    some = forward(model, ROWS)
    torch.testing.assert_close(some.losses[0], whole.losses[0])
    assert bool((some.losses[1:] < whole.losses[1:]).all()), "fewer rivals, less loss"


def test_the_loss_is_divided_by_what_it_is_told(base: Path) -> None:
    model = build(base)
    whole = forward(model, ROWS)
    assert int(whole.counts[0]) == ITEMS - 1, "a row without a prompt has no state before its first token"
    decay = model._options.stream_decay
    expected = sum(decay**k * whole.losses[k] for k in range(3)) / ITEMS
    torch.testing.assert_close(whole.loss, expected)
    torch.testing.assert_close(forward(model, ROWS, items=2 * ITEMS).loss, whole.loss / 2)


def test_trainable_weights_are_saved_and_read_back(base: Path, tmp_path: Path) -> None:
    trained, fresh = build(base), build(base, noise=0.0)
    trained.save_trainable(tmp_path)
    assert (tmp_path / TRAINABLE).stat().st_size < 600_000
    fresh.load_trainable(tmp_path)
    same(fresh.trainable_state(), trained.trainable_state(), rtol=0, atol=0)
    for other in ({"lora_rank": 3}, {"streams": 3}, {"conditioned": False}, {"method": "lora"}):
        with pytest.raises(InvalidRequest, match="a checkpoint of another configuration"):
            build(base, **other).load_trainable(tmp_path)


def test_a_later_phase_takes_lora_and_streams_and_freezes_the_lora(base: Path, tmp_path: Path) -> None:
    trained, follow = build(base, lora_dropout=0.3), build(base, noise=0.0, lora_dropout=0.3)
    trained.save_trainable(tmp_path)
    follow.load_trainable(tmp_path)
    follow.freeze_lora()
    state = trained.trainable_state()
    assert not any(True for _ in follow.lora_parameters())
    same(follow.trainable_state(), {n: t for n, t in state.items() if n.startswith("streams.")}, rtol=0, atol=0)
    assert isinstance(follow.base, PeftModel)
    for name, tensor in get_peft_model_state_dict(follow.base).items():
        assert torch.equal(tensor, get_peft_model_state_dict(trained.base)[name]), name
    follow.train()
    assert torch.equal(forward(follow, ROWS).losses, forward(follow, ROWS).losses), "no dropout in what is frozen"


def test_the_same_seed_starts_the_same(base: Path) -> None:
    first, again, other = (build(base, noise=0.0, seed=seed).trainable_state() for seed in (3, 3, 4))
    same(first, again, rtol=0, atol=0)
    assert any(not torch.equal(first[n], other[n]) for n in first if "lora_A" in n)
    assert not torch.equal(first["streams.a"], other["streams.a"])
    lora = build(base, noise=0.0, seed=3, method="lora").trainable_state()
    same(lora, {n: t for n, t in first.items() if n in lora}, rtol=0, atol=0)


def test_targets_that_make_no_sense_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="lora_targets: "):
        build(base, lora_targets=("nothing_of_the_kind",))
    with pytest.raises(InvalidRequest, match="lora_targets names the LM head"):
        build(base, lora_targets=("lm_head",))
    with pytest.raises(ModelUnsupported, match="could not be loaded as a causal language model"):
        build_model(quick_config(tmp_path, tmp_path, tmp_path), tmp_path, 8)
