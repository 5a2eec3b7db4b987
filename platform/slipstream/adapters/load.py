"""From a validated folder to canonical weights. Never called on a folder that `inspect_adapter` has not accepted."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from slipstream.adapters.peft_config import PEFT_CONFIG, PEFT_PREFIX, PEFT_TENSORS, read_peft_config
from slipstream.adapters.turbo_config import TURBO_TENSORS, read_stream_config
from slipstream.adapters.weights import AdapterWeights, LoraModule, StreamWeights


def load_adapter(folder: Path) -> AdapterWeights:
    """The weights of a folder in any supported layout, on the CPU, in the dtype they have on disk."""
    return AdapterWeights(lora=_load_lora(folder), streams=_load_streams(folder))


def _load_lora(folder: Path) -> dict[str, LoraModule]:
    if not (folder / PEFT_CONFIG).is_file():
        return {}
    config = read_peft_config(folder / PEFT_CONFIG)
    tensors: dict[str, torch.Tensor] = load_file(folder / PEFT_TENSORS)
    marker = ".lora_A.weight"
    paths = sorted(key[len(PEFT_PREFIX) : -len(marker)] for key in tensors if key.endswith(marker))
    return {
        path: LoraModule(
            a=tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"],
            b=tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"],
            scale=config.scale_of(path),
            magnitude=tensors.get(f"{PEFT_PREFIX}{path}.lora_magnitude_vector"),
        )
        for path in paths
    }


def _load_streams(folder: Path) -> StreamWeights | None:
    config = read_stream_config(folder)
    if config is None:
        return None
    if config.own_layout:
        tensors: dict[str, torch.Tensor] = load_file(folder / TURBO_TENSORS)
    else:
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            if path.name != PEFT_TENSORS:
                tensors |= load_file(path)

    def stack(part: str) -> torch.Tensor | None:
        keys = [config.key(k, part) for k in range(config.num_streams)]
        return torch.stack([tensors[key] for key in keys]) if keys[0] in tensors else None

    bias = stack("bias")
    assert bias is not None  # validation has seen it
    return StreamWeights(bias, stack("weight"), stack("A"), stack("B"), stack("C"), stack("head"))
