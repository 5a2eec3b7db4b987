"""`load_adapter` against PEFT itself: the same delta for every module, whatever the options."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import random_peft_adapter

from slipstream.adapters.load import load_adapter
from slipstream.adapters.validate import inspect_adapter
from slipstream.protocol import BaseModelSpec

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "regex targets": {"target_modules": r".*\.layers\.[02]\.self_attn\.(q|o)_proj"},
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 5},
    "rank pattern": {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 6}},
    "alpha pattern": {"target_modules": ALL, "alpha_pattern": {r"layers\.0\..*_proj": 3, "down_proj": 64}},
    "first pattern wins": {
        "target_modules": ALL,
        "rank_pattern": {r".*layers\.1\.self_attn\.q_proj": 3, "q_proj": 5, "self_attn.v_proj": 2},
        "alpha_pattern": {"v_proj": 1, "layers.2.self_attn.v_proj": 9, r"^model\.layers\.0\.mlp\.up_proj": 11},
    },
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 7}},
    "rank 1": {"r": 1, "lora_alpha": 0.5},
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "dora": {"use_dora": True, "target_modules": ALL},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "bf16": {"dtype": torch.bfloat16},
}


def reload(model: Any, folder: Path) -> Any:
    """PEFT's own reading of the folder. Not the model that saved it: PEFT sorts patterns when it saves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(model), str(folder))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_same_deltas_as_peft(options: dict[str, Any], tiny: Any, tmp_path: Path, base: BaseModelSpec) -> None:
    random_peft_adapter(tiny, tmp_path, **options)
    found = inspect_adapter(tmp_path, base)
    peft_model = reload(tiny, tmp_path)
    loaded = load_adapter(tmp_path).lora
    layers = {
        path: module
        for path, module in peft_model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(loaded) == set(layers)
    assert found.rank == max(m.rank for m in loaded.values())
    for path, layer in layers.items():
        ours = loaded[path]
        delta = ours.scale * (ours.b.float() @ ours.a.float())
        torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-6, atol=1e-6)
        assert float(delta.abs().max()) > 0


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}])
def test_dora_merges_to_the_same_weight(options: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    peft_model = random_peft_adapter(tiny, tmp_path, use_dora=True, **options)
    loaded = load_adapter(tmp_path).lora
    merged = dict(peft_model.merge_and_unload().named_modules())
    for path, module in loaded.items():
        weight = tiny.get_submodule(path).weight + module.scale * (module.b @ module.a)
        assert module.magnitude is not None
        expected = module.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(merged[path].weight, expected, rtol=1e-5, atol=1e-6)
