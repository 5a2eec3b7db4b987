"""A tiny random model of every family that the README names."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW: dict[str, Any] = {"sliding_window": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, **WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, **WINDOW, "query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
}


def tiny(family: str) -> Any:
    torch.manual_seed(7)
    config = CONFIG_MAPPING[family](**SHAPE, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()
