"""A decoder in one C++ call against the same decoder layer by layer: every hidden state of every step, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import random_peft_adapter
from support.engine import Harness, Job
from support.families import tiny
from support.zoo import ALL_LINEAR

from slipstream.engine.config import FastPath
from slipstream.engine.native.build import library
from slipstream.engine.quantized import Quantization
from slipstream.protocol import SamplingParams

FIXED = FastPath.ADAPTIVE_DRAFTS
ADAPTERS: dict[str, dict[str, Any]] = {
    "wide": {"r": 20, "target_modules": ALL_LINEAR},
    "narrow": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "first": {"r": 3, "target_modules": ["gate_proj"], "layers_to_transform": [0]},
}


@pytest.fixture(autouse=True)
def _has_kernel() -> None:
    found = library()
    if found is None or not found.slipstream_has_product():
        pytest.skip("no compiler, or a processor without AVX512-BF16")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Recorded:
    """A harness that keeps the hidden states of each step, and counts the steps that went in one call."""

    def __init__(
        self, model: Any, adapters: dict[str, Path], *disable: FastPath, quantize: Quantization | None = None
    ) -> None:
        disable = (FIXED, *disable)
        self.harness = Harness(
            model, adapters, max_batched_tokens=24, eos=frozenset(), disable=disable, quantize=quantize
        )
        self.hidden: list[torch.Tensor] = []
        self.whole = 0
        runner: Any = self.harness.runner
        forward, flat = runner._forward, runner._flat

        def record(batch: Any) -> torch.Tensor:
            out: torch.Tensor = forward(batch)
            self.hidden.append(out.clone())
            return out

        runner._forward = record
        if flat._whole is not None:
            whole = flat._whole

            def count(*args: Any) -> torch.Tensor | None:
                out: torch.Tensor | None = whole(*args)
                self.whole += out is not None
                return out

            flat._whole = count

    def run(self, jobs: list[Job]) -> list[list[int]]:
        return self.harness.run(jobs)


def jobs(*adapters: str | None) -> list[Job]:
    """Prompts of one token and of several chunks; some come while others decode."""
    generator = torch.Generator().manual_seed(5)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    return [
        Job(torch.randint(3, 200, (1 + 13 * i,), generator=generator).tolist(), params, name, start_step=2 * i)
        for i, name in enumerate(adapters)
    ]


def write(model: Any, root: Path, **adapters: dict[str, Any]) -> dict[str, Path]:
    for i, (name, kwargs) in enumerate(adapters.items()):
        random_peft_adapter(model, root / name, seed=i, **kwargs)
    return {name: root / name for name in adapters}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_it_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():  # which a new model has at zero and one
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.5, generator=generator)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    folders = write(model, tmp_path, **ADAPTERS)
    work = (None, "wide", "narrow", None, "wide", "first")
    model = model.to(torch.bfloat16)
    one, each = Recorded(model, folders), Recorded(model, folders, FastPath.WHOLE_DECODER)
    assert one.run(jobs(*work)) == each.run(jobs(*work))
    assert len(one.hidden) == len(each.hidden) > 12
    assert all(torch.equal(a, b) for a, b in zip(one.hidden, each.hidden, strict=True))
    assert one.whole == len(one.hidden)
    assert each.whole == 0


@pytest.mark.usefixtures("two_threads")
def test_so_does_a_base_in_8_bits(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    folders = write(model, tmp_path, **ADAPTERS)
    work = (None, "wide", "narrow", None, "wide", "first")
    one = Recorded(model, folders, quantize=Quantization.INT8)
    each = Recorded(model, folders, FastPath.WHOLE_DECODER, quantize=Quantization.INT8)
    assert one.run(jobs(*work)) == each.run(jobs(*work))
    assert all(torch.equal(a, b) for a, b in zip(one.hidden, each.hidden, strict=True))
    assert one.whole == len(one.hidden) > 12
    full = Recorded(model, folders)
    full.run(jobs(*work))
    assert not all(torch.equal(a, b) for a, b in zip(one.hidden, full.hidden, strict=False)), "nothing was rounded"


def test_adapters_with_dora_go_layer_by_layer(tmp_path: Path) -> None:
    model = tiny("llama")
    folders = write(model, tmp_path, narrow=ADAPTERS["narrow"], dora={"r": 4, "use_dora": True})
    one = Recorded(model.to(torch.bfloat16), folders)
    each = Recorded(model, folders, FastPath.WHOLE_DECODER)
    assert one.run(jobs("narrow", None)) == each.run(jobs("narrow", None))
    before = one.whole
    assert before == len(one.hidden)
    assert one.run(jobs("dora", "narrow")) == each.run(jobs("dora", "narrow"))
    assert one.whole < len(one.hidden)
    for name in ("dora", "narrow"):
        one.harness.core.forget_adapter(name)
        each.harness.core.forget_adapter(name)
    steps = len(one.hidden) - one.whole
    assert one.run(jobs("narrow", None)) == each.run(jobs("narrow", None))
    assert len(one.hidden) - one.whole == steps, "it has gone, and all go in one call again"
    assert all(torch.equal(a, b) for a, b in zip(one.hidden, each.hidden, strict=True))


def test_weights_that_move_are_found_again(tmp_path: Path) -> None:
    """More adapters than a stack had places: it grows, and its tensors lie elsewhere."""
    model = tiny("llama")
    folders = write(model, tmp_path, **{f"a{i}": {"r": 4, "target_modules": ALL_LINEAR} for i in range(5)})
    model = model.to(torch.bfloat16)
    one, each = Recorded(model, folders), Recorded(model, folders, FastPath.WHOLE_DECODER)
    for names in (["a0"], ["a0", "a1"], ["a2", "a3", "a4", "a1"]):
        assert one.run(jobs(*names)) == each.run(jobs(*names))
    assert all(torch.equal(a, b) for a, b in zip(one.hidden, each.hidden, strict=True))
    assert one.whole == len(one.hidden)


def test_other_formats_go_layer_by_layer() -> None:
    assert Recorded(tiny("llama"), {}).harness.runner._flat._whole is None
