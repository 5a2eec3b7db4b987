"""Our own layout and the LoRAX export, written and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import TINY_ID, random_streams

from adapter_registry.records import AdapterKind, PromptFormat
from slipstream.adapters.load import load_adapter
from slipstream.adapters.save import TurboMetadata, dense_weight, export_lorax, save_medusa, save_turbo
from slipstream.adapters.validate import inspect_adapter
from slipstream.adapters.weights import AdapterWeights, StreamWeights
from slipstream.errors import InvalidRequest
from slipstream.protocol import BaseModelSpec


def assert_same_streams(found: StreamWeights | None, expected: StreamWeights) -> None:
    assert found is not None
    for part in ("bias", "weight", "a", "b", "c", "head"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert (ours is None) == (theirs is None), part
        assert ours is None or torch.equal(ours, theirs), part


def assert_same_lora(found: AdapterWeights, expected: AdapterWeights) -> None:
    assert found.lora.keys() == expected.lora.keys()
    for path, module in found.lora.items():
        other = expected.lora[path]
        assert module.scale == other.scale
        assert torch.equal(module.a, other.a)
        assert torch.equal(module.b, other.b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "conditioned"), [(4, False), (4, True), (None, False)])
@pytest.mark.parametrize("num_streams", [1, 3, 8])
def test_round_trip(
    num_streams: int, rank: int | None, conditioned: bool, dtype: torch.dtype, tmp_path: Path, base: BaseModelSpec
) -> None:
    streams = random_streams(32, num_streams, rank=rank, conditioned=conditioned, dtype=dtype)
    rates = tuple(0.9 - 0.1 * k for k in range(num_streams))
    save_turbo(tmp_path / "new", streams, TurboMetadata(TINY_ID, base.base_digest, rates, PromptFormat.CHAT))
    found = inspect_adapter(tmp_path / "new", base)
    assert (found.kind, found.num_streams, found.stream_rank) == (AdapterKind.TURBO, num_streams, rank)
    assert (found.acceptance, found.prompt_format, found.warnings) == (rates, PromptFormat.CHAT, ())
    assert_same_streams(load_adapter(tmp_path / "new").streams, streams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_streams", [1, 3, 8])
@pytest.mark.parametrize("lora", [False, True])
def test_medusa_round_trip(
    lora: bool, num_streams: int, dtype: torch.dtype, valid_folders: Path, tmp_path: Path, base: BaseModelSpec
) -> None:
    streams = random_streams(32, num_streams, vocab=128, dtype=dtype)
    rates = tuple(0.9 - 0.1 * k for k in range(num_streams))
    metadata = TurboMetadata(TINY_ID, base.base_digest, rates, PromptFormat.CHAT)
    save_medusa(tmp_path / "new", streams, metadata, valid_folders / "peft" if lora else None)
    found = inspect_adapter(tmp_path / "new", base)
    assert (found.kind, found.num_streams, found.stream_rank) == (AdapterKind.MEDUSA, num_streams, None)
    assert (found.base_digest, found.acceptance) == (base.base_digest, rates)
    assert (found.prompt_format, found.warnings) == (PromptFormat.CHAT, ())
    loaded = load_adapter(tmp_path / "new")
    assert_same_streams(loaded.streams, streams)
    if lora:
        assert_same_lora(loaded, load_adapter(valid_folders / "peft"))
    else:
        assert loaded.lora == {}


def test_medusa_1_is_what_lorax_reads(tmp_path: Path) -> None:
    streams = random_streams(32, 2, vocab=128)
    save_medusa(tmp_path, streams, TurboMetadata(TINY_ID))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "base_model_name_or_path": TINY_ID,
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "version": "1",
    }
    held = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert {name: tuple(t.shape) for name, t in held.items()} == {
        name: shape
        for k in range(2)
        for name, shape in {
            f"{k}.0.linear.weight": (32, 32),
            f"{k}.0.linear.bias": (32,),
            f"{k}.1.weight": (128, 32),
        }.items()
    }
    assert streams.head is not None
    assert torch.equal(held["1.1.weight"], streams.head[1])


def test_each_kind_of_heads_has_its_writer(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="save_medusa"):
        save_turbo(tmp_path / "out", random_streams(32, vocab=128), TurboMetadata(TINY_ID))
    with pytest.raises(InvalidRequest, match="save_turbo"):
        save_medusa(tmp_path / "out", random_streams(32, rank=None), TurboMetadata(TINY_ID))
    assert not (tmp_path / "out").exists()


def test_the_lora_is_copied_beside_the_streams(valid_folders: Path, tmp_path: Path, base: BaseModelSpec) -> None:
    save_turbo(tmp_path, random_streams(32), TurboMetadata(TINY_ID), valid_folders / "peft")
    assert inspect_adapter(tmp_path, base).kind is AdapterKind.TURBO_LORA
    assert_same_lora(load_adapter(tmp_path), load_adapter(valid_folders / "peft"))


def test_streams_are_added_to_a_peft_folder_in_place(copy_of: Callable[[str], Path], base: BaseModelSpec) -> None:
    folder = copy_of("peft")
    save_turbo(folder, random_streams(32), TurboMetadata(TINY_ID), folder)
    assert inspect_adapter(folder, base).kind is AdapterKind.TURBO_LORA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, None])
def test_lorax_export(
    rank: int | None, dtype: torch.dtype, valid_folders: Path, tmp_path: Path, base: BaseModelSpec
) -> None:
    streams = random_streams(32, 3, rank=rank, dtype=dtype)
    metadata = TurboMetadata(TINY_ID, base.base_digest, (0.9, 0.5, 0.25), PromptFormat.CHAT)
    save_turbo(tmp_path / "own", streams, metadata, valid_folders / "peft")
    export_lorax(tmp_path / "own", tmp_path / "lorax")
    found = inspect_adapter(tmp_path / "lorax", base)
    assert (found.kind, found.num_streams, found.stream_rank) == (AdapterKind.TURBO_LORA, 3, None)
    assert (found.base_digest, found.prompt_format) == (base.base_digest, PromptFormat.CHAT)
    assert found.acceptance == (0.9, 0.5, 0.25)
    loaded = load_adapter(tmp_path / "lorax")
    assert_same_streams(loaded.streams, StreamWeights(bias=streams.bias, weight=dense_weight(streams)))
    assert_same_lora(loaded, load_adapter(tmp_path / "own"))


def test_the_export_is_what_lorax_reads(tmp_path: Path) -> None:
    save_turbo(tmp_path / "own", random_streams(32, 2), TurboMetadata(TINY_ID))
    export_lorax(tmp_path / "own", tmp_path / "lorax")
    config = json.loads((tmp_path / "lorax" / "config.json").read_text())
    assert config == {
        "base_model_name_or_path": TINY_ID,
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "version": "2",
    }


def test_dense_streams_compute_what_low_rank_ones_do() -> None:
    streams = random_streams(32, 3, rank=4)
    assert streams.a is not None
    assert streams.b is not None
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    low_rank = torch.einsum("khr,krd,nd->knh", streams.b, streams.a, hidden)
    torch.testing.assert_close(torch.einsum("khd,nd->knh", dense_weight(streams), hidden), low_rank)


def test_conditioned_streams_cannot_be_exported(valid_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="conditioned=False"):
        export_lorax(valid_folders / "own", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["peft", "lorax"])
def test_only_our_own_layout_is_exported(layout: str, valid_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"turbo_config\.json"):
        export_lorax(valid_folders / layout, tmp_path / "out")
