"""Tiny base models and adapters for tests: random, seeded, and large enough in effect to change the output."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream.adapters.save import TurboMetadata, save_turbo
from slipstream.adapters.weights import StreamWeights
from slipstream.protocol import BaseModelSpec

TINY_ID = "tests/tiny-llama"


def tiny_llama(
    *, hidden: int = 32, layers: int = 3, heads: int = 4, vocab: int = 128, tie: bool = False, seed: int = 0
) -> LlamaForCausalLM:
    """A random float32 Llama (two key/value heads, 256 positions) in evaluation mode."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    config._name_or_path = TINY_ID
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.name_or_path = TINY_ID
    return model.eval()


def rename_base(folder: Path, base: str) -> None:
    """Have an adapter's config name another base model."""
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))


def base_spec_of(model: Any, model_id: str = TINY_ID) -> BaseModelSpec:
    """What `model` is checked against; its digest is derived from the id, not from the weights."""
    config = model.config
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return BaseModelSpec(
        id=model_id,
        base_digest="sha256:" + hashlib.sha256(model_id.encode()).hexdigest(),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        context_length=config.max_position_embeddings,
        eos_token_ids=(config.eos_token_id,),
        has_chat_template=False,
        linears=linears,
    )


def random_peft_adapter(
    model: Any, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **lora_kwargs: Any
) -> Any:
    """Save a random LoRA for `model` with PEFT's own `save_pretrained`; return the PEFT model (over a copy of `model`).

    `lora_kwargs` go to `LoraConfig` (default: r=4, alpha=8, q_proj and v_proj). B is non-zero, so that the output
    changes; DoRA magnitudes are moved away from the base's norms.
    """
    kwargs: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora_kwargs}
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property that has a new name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **kwargs))
    peft_model.peft_config["default"].base_model_name_or_path = TINY_ID
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.2 * noise)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * noise)
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    # PEFT would add the whole embedding when lm_head is a target; that copy is not part of the adapter.
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    return peft_model.eval()


def random_streams(
    hidden: int,
    num_streams: int = 3,
    *,
    rank: int | None = 4,
    conditioned: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab: int | None = None,
) -> StreamWeights:
    """Random streams in memory: low-rank, or dense for `rank=None`; with `vocab`, dense ones with their own LM heads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        noise: torch.Tensor = torch.randn(num_streams, *shape, generator=generator)
        scaled: torch.Tensor = noise * hidden**-0.5
        return scaled.to(dtype)

    if vocab is not None:
        return StreamWeights(bias=draw(hidden), weight=draw(hidden, hidden), head=draw(vocab, hidden))
    if rank is None:
        return StreamWeights(bias=draw(hidden), weight=draw(hidden, hidden))
    c = draw(rank, hidden) if conditioned else None
    return StreamWeights(bias=draw(hidden), a=draw(rank, hidden), b=draw(hidden, rank), c=c)


def write_own_streams(folder: Path, streams: StreamWeights, *, base_model: str = TINY_ID) -> None:
    """Add `streams` to `folder` in our own layout, naming no digest and no acceptance."""
    save_turbo(folder, streams, TurboMetadata(base_model=base_model))


def turbo_folders(model: Any, folder: Path, targets: Mapping[str, list[str]]) -> dict[str, Path]:
    """Random Turbo LoRAs of three streams, by name; the LoRA of each is on its targets."""
    for seed, (name, on) in enumerate(targets.items()):
        random_peft_adapter(model, folder / name, seed=seed, r=4, target_modules=on)
        write_own_streams(folder / name, random_streams(model.config.hidden_size, 3, seed=seed))
    return {name: folder / name for name in targets}


def write_lorax_streams(folder: Path, streams: StreamWeights, *, base_model: str = TINY_ID) -> None:
    """Add dense `streams` to `folder` in the LoRAX layout, written by hand and not by the writers under test."""
    folder.mkdir(parents=True, exist_ok=True)
    assert streams.weight is not None, "LoRAX streams are dense: rank=None"
    tensors = {}
    for k in range(streams.num_streams):
        tensors[f"{k}.0.linear.weight"] = streams.weight[k].clone()
        tensors[f"{k}.0.linear.bias"] = streams.bias[k].clone()
        if streams.head is not None:
            tensors[f"{k}.1.weight"] = streams.head[k].clone()
    save_file(tensors, folder / "medusa_lm_head.safetensors", metadata={"format": "pt"})
    version = "2" if streams.head is None else "1"
    config = {"medusa_num_heads": streams.num_streams, "medusa_num_layers": 1, "version": version}
    (folder / "config.json").write_text(json.dumps({"base_model_name_or_path": base_model, **config}))
