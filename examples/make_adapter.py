"""Make a small Turbo LoRA for the default base model, untrained: something to push before you have one of your own.

    python examples/make_adapter.py my-adapter

A LoRA of rank 8 on q_proj and v_proj whose B is close to zero, and three streams in their initial state. Its answers are
nearly the base model's; its drafts are guesses. A trained adapter has the same files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapter_registry.records import PromptFormat
from slipstream.adapters.save import TurboMetadata, save_turbo
from slipstream.adapters.weights import StreamWeights

BASE, LAYERS, HIDDEN, KEY_VALUE = "HuggingFaceTB/SmolLM2-135M-Instruct", 30, 576, 192
RANK, STREAMS, STREAM_RANK = 8, 3, 64


def write_lora(folder: Path, generator: torch.Generator) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT's `save_pretrained` writes them."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE,
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for layer in range(LAYERS):
        for name, width in (("q_proj", HIDDEN), ("v_proj", KEY_VALUE)):
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) / HIDDEN**0.5
            tensors[f"{path}.lora_B.weight"] = 1e-3 * torch.randn(width, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")


def write_streams(folder: Path, generator: torch.Generator) -> None:
    """turbo_config.json and turbo_streams.safetensors: low-rank streams at their start, B = 0."""
    streams = StreamWeights(
        bias=torch.zeros(STREAMS, HIDDEN),
        a=torch.randn(STREAMS, STREAM_RANK, HIDDEN, generator=generator) / HIDDEN**0.5,
        b=torch.zeros(STREAMS, HIDDEN, STREAM_RANK),
    )
    save_turbo(folder, streams, TurboMetadata(base_model=BASE, prompt_format=PromptFormat.CHAT))


def main() -> None:
    """Write the adapter into the folder that the command line names."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    write_lora(folder, generator)
    write_streams(folder, generator)
    sys.stdout.write(f"Wrote a Turbo LoRA to {folder}\n")


if __name__ == "__main__":
    main()
