"""transformers and PEFT as peers, in this process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.workload import adapter_folder
from slipstream.adapters.weights import AdapterWeights


def generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int, adapters: Sequence[str] | None) -> float:
    """Seconds of `generate` on one left-padded batch of fixed-length answers."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    extra = {"adapter_names": list(adapters)} if adapters else {}
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
            pad_token_id=0, **extra,
        )  # fmt: skip
    return time.perf_counter() - began


def peft_mixed(path: Path, dtype: torch.dtype, folders: Mapping[str, Path]) -> Any:
    """PEFT with several adapters, for mixed batches by `adapter_names`."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for name, folder in folders.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    return model.to(dtype).eval()


def write_peft(adapters: Mapping[str, AdapterWeights], task: str = "snips") -> dict[str, Path]:
    """The adapters' LoRAs as PEFT folders, in a temporary place that stays until the process ends."""
    source = adapter_folder(task)
    root = Path(tempfile.mkdtemp(prefix="slipstream-bench-"))
    folders = {}
    for name, weights in adapters.items():
        folder = root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        tensors = load_file(source / "adapter_model.safetensors")
        for path, module in weights.lora.items():
            tensors[f"base_model.model.{path}.lora_B.weight"] = module.b.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        folders[name] = folder
    return folders
