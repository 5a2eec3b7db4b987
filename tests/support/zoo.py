"""A base model and adapters of every kind, with PEFT's model of each as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.adapters import random_peft_adapter, random_streams, tiny_llama, write_lorax_streams, write_own_streams

from slipstream.protocol import SamplingParams

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPECULATING = {"all-linear", "dora", "patterns", "streams-only", "rslora", "lm-head", "medusa-only"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR},
    "rslora": {"r": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 10, "model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"k_proj": 32},
    },
    "some-layers": {"r": 3, "target_modules": ["gate_proj"], "layers_to_transform": [0, 2]},
    "lm-head": {"r": 4, "target_modules": ["v_proj", "lm_head"]},
}


Zoo = tuple[Any, dict[str, Path], dict[str, Any]]


def make_zoo(root: Path) -> Zoo:
    """A base model, a folder per kind (with streams of its own shape), and PEFT's model of each."""
    model = tiny_llama()
    folders, oracles = {}, {}
    for i, (kind, kwargs) in enumerate(KINDS.items()):
        folder = root / kind
        oracles[kind] = random_peft_adapter(model, folder, seed=i, **kwargs)
        folders[kind] = folder
    hidden = model.config.hidden_size
    write_own_streams(folders["all-linear"], random_streams(hidden, 3, rank=4, seed=1))
    write_own_streams(folders["dora"], random_streams(hidden, 5, rank=6, conditioned=True, seed=2))
    write_lorax_streams(folders["patterns"], random_streams(hidden, 2, rank=None, seed=3))
    vocab = model.config.vocab_size
    write_lorax_streams(folders["rslora"], random_streams(hidden, 3, vocab=vocab, seed=5))
    write_lorax_streams(folders["lm-head"], random_streams(hidden, 2, vocab=vocab, seed=6))
    for name in ("streams-only", "medusa-only"):
        folders[name] = root / name
        folders[name].mkdir()
        oracles[name] = model
    write_own_streams(folders["streams-only"], random_streams(hidden, 4, rank=4, seed=4))
    write_lorax_streams(folders["medusa-only"], random_streams(hidden, 8, vocab=vocab, seed=7))
    return model, folders, oracles


def prompts(count: int, vocab: int = 128) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, vocab, (5 + 9 * i,), generator=generator).tolist() for i in range(count)]


def greedy(max_tokens: int = 20) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)
