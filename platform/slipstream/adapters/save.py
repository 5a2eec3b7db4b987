"""Writing adapter folders: our own Turbo layout, and LoRAX's two (dense streams, Medusa-1) for other engines as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapter_registry.records import PromptFormat
from slipstream.adapters.load import load_adapter
from slipstream.adapters.peft_config import PEFT_CONFIG, PEFT_TENSORS
from slipstream.adapters.turbo_config import (
    FORMAT_VERSION,
    LORAX_CONFIG,
    LORAX_TENSORS,
    SLIPSTREAM_CONFIG,
    TURBO_CONFIG,
    TURBO_TENSORS,
    read_turbo_config,
)
from slipstream.adapters.weights import StreamWeights
from slipstream.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class TurboMetadata:
    """What `turbo_config.json`, or `config.json` with `slipstream.json`, says besides the shapes."""

    base_model: str
    base_digest: str | None = None
    acceptance: tuple[float, ...] = ()  # conditional, by position; one per stream, or empty when not measured
    prompt_format: PromptFormat = PromptFormat.RAW


def save_turbo(folder: Path, streams: StreamWeights, metadata: TurboMetadata, peft_folder: Path | None = None) -> None:
    """Write our own layout into `folder` (made if need be); `peft_folder`'s LoRA, if given, is copied beside it.

    Raises `InvalidRequest` for streams with LM heads of their own, which this layout has no place for.
    """
    if streams.head is not None:
        raise InvalidRequest("Streams with LM heads of their own (Medusa-1) are written by save_medusa.")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format_version": FORMAT_VERSION,
        "base_model": metadata.base_model,
        "base_digest": metadata.base_digest,
        "num_streams": streams.num_streams,
        "stream_rank": None if streams.a is None else streams.a.shape[1],
        "conditioned": streams.c is not None,
        "acceptance": list(metadata.acceptance),
        "prompt_format": metadata.prompt_format.value,
    }
    parts = {"weight": streams.weight, "bias": streams.bias, "A": streams.a, "B": streams.b, "C": streams.c}
    _save_streams(folder / TURBO_TENSORS, {f"turbo.{{}}.{part}": stacked for part, stacked in parts.items()})
    _write_json(folder / TURBO_CONFIG, config)
    if peft_folder is not None:
        _copy_lora(peft_folder, folder)


def save_medusa(folder: Path, streams: StreamWeights, metadata: TurboMetadata, peft_folder: Path | None = None) -> None:
    """Write dense streams with LM heads of their own as LoRAX's Medusa version 1, as `save_turbo` does ours.

    Raises `InvalidRequest` for streams that share the base's LM head.
    """
    if streams.head is None:
        raise InvalidRequest("These streams share the base's LM head: write them with save_turbo.")
    _write_lorax(folder, streams, metadata)
    if peft_folder is not None:
        _copy_lora(peft_folder, folder)


def save_options(folder: Path, metadata: TurboMetadata) -> None:
    """Write `slipstream.json`: what a plain PEFT or LoRAX folder cannot say."""
    options: dict[str, object] = {
        "base_digest": metadata.base_digest,
        "prompt_format": metadata.prompt_format.value,
        "acceptance": list(metadata.acceptance),
    }
    _write_json(folder / SLIPSTREAM_CONFIG, options)


def export_lorax(source: Path, target: Path) -> None:
    """Write `source`, a validated folder in our own layout, as LoRAX, TGI and vLLM read it: dense, W_k = B_k A_k.

    The product is rounded once, to the dtype of B. `slipstream.json`, which those engines ignore, keeps what their
    layout cannot say. Raises `InvalidRequest` for folders without our streams, and for conditioned streams, which have
    no dense form.
    """
    if not (source / TURBO_CONFIG).is_file():
        raise InvalidRequest("Only an adapter in Slipstream's own layout (turbo_config.json) can be exported to LoRAX.")
    config = read_turbo_config(source / TURBO_CONFIG)
    streams = load_adapter(source).streams
    assert streams is not None  # there is a turbo_config.json
    assert config.base_model is not None  # required by that layout
    metadata = TurboMetadata(
        config.base_model, config.base_digest, config.acceptance, config.prompt_format or PromptFormat.RAW
    )
    _write_lorax(target, StreamWeights(streams.bias, dense_weight(streams)), metadata)
    if (source / PEFT_CONFIG).is_file():
        _copy_lora(source, target)


def dense_weight(streams: StreamWeights) -> torch.Tensor:
    """The streams as one [K, H, H] matrix each. Raises `InvalidRequest` for conditioned streams."""
    if streams.c is not None:
        raise InvalidRequest("Conditioned streams have no dense form: train with conditioned=False to export to LoRAX.")
    if streams.weight is not None:
        return streams.weight
    assert streams.a is not None
    assert streams.b is not None
    return torch.bmm(streams.b.float(), streams.a.float()).to(streams.b.dtype)


def _write_lorax(folder: Path, streams: StreamWeights, metadata: TurboMetadata) -> None:
    """LoRAX's layout for dense streams; what it cannot say goes to `slipstream.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"{}.0.linear.weight": streams.weight, "{}.0.linear.bias": streams.bias, "{}.1.weight": streams.head}
    _save_streams(folder / LORAX_TENSORS, parts)
    version = "2" if streams.head is None else "1"
    heads = {"medusa_num_heads": streams.num_streams, "medusa_num_layers": 1, "version": version}
    _write_json(folder / LORAX_CONFIG, {"base_model_name_or_path": metadata.base_model, **heads})
    save_options(folder, metadata)


def _save_streams(path: Path, parts: Mapping[str, torch.Tensor | None]) -> None:
    """`parts`: pattern of a tensor name, with a place for the stream's number → stacked over the streams."""
    tensors = {
        pattern.format(k): row.contiguous().cpu()
        for pattern, stacked in parts.items()
        if stacked is not None
        for k, row in enumerate(stacked.unbind())
    }
    # A clone each: safetensors refuses tensors that share memory, and the rows of one stack do.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _copy_lora(source: Path, target: Path) -> None:
    for name in (PEFT_CONFIG, PEFT_TENSORS):
        if source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
