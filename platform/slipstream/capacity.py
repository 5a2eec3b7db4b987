"""How many bytes and replicas something takes, from a base model's config alone. Pure Python; docs/operations/capacity.md has
the formulas. `tests/integration/test_capacity.py` holds each of them to what the engine really allocates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.errors import InvalidRequest
from slipstream.protocol import work

# Whose decoder layers have q, k, v, o, gate, up and down projections, and nothing else that a LoRA is put on.
GATED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"})
TARGET_SHARE = 0.6  # of a replica's top speed: what the simulated autoscaler kept its SLO with


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What sizes depend on; `value_bytes` is of one number of weights and KV cache."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    value_bytes: int = 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any], value_bytes: int = 2) -> ModelShape:
        """Of a `config.json`. Raises `InvalidRequest` for families whose adapters have another form."""
        family = config.get("model_type")
        if family not in GATED:
            raise InvalidRequest(
                f"Sizes are known for {', '.join(sorted(GATED))}, and this is {family!r}.", param="model"
            )
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                intermediate=int(config["intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                value_bytes=value_bytes,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"The model's config.json lacks {error}, or it is no number.", param="model"
            ) from error

    @property
    def kv_token_bytes(self) -> int:
        """KV cache of one token, on all ranks together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes

    def kv_tokens(self, kv_cache_bytes: int, block_size: int = 16) -> int:
        """Tokens that a cache holds: whole blocks only."""
        return kv_cache_bytes // (self.kv_token_bytes * block_size) * block_size

    def lora_bytes(self, rank: int) -> int:
        """A LoRA on all seven linears of every layer: `rank × (in + out)` numbers each."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + q) + 2 * (self.hidden + kv)
        mlp = 3 * (self.hidden + self.intermediate)
        return self.layers * rank * (attention + mlp) * self.value_bytes

    def streams_bytes(self, streams: int, rank: int | None = None) -> int:
        """Turbo streams with their biases: dense, or low-rank with `rank`."""
        matrix = self.hidden * self.hidden if rank is None else 2 * self.hidden * rank
        return streams * (matrix + self.hidden) * self.value_bytes


def read_shape(model: Path, value_bytes: int = 2) -> ModelShape:
    """Of the model in a folder, or of a `config.json`. Raises `InvalidRequest`."""
    path = model / "config.json" if model.is_dir() else model
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"There is no readable config.json at {path}.", param="model") from error
    return ModelShape.from_config(found if isinstance(found, dict) else {}, value_bytes)


def target_requests_per_s(work_per_s: float, prompt_tokens: float, answer_tokens: float) -> float:
    """What one replica is meant to take, of requests of this length; `work_per_s` is what it did when it was full, in answer
    tokens (a prompt token counts a fifth)."""
    return TARGET_SHARE * work_per_s / work_of(prompt_tokens, answer_tokens)


def work_of(prompt_tokens: float, answer_tokens: float) -> float:
    """Of one request, in answer tokens."""
    return work(1, 0) * prompt_tokens + answer_tokens


def replicas(requests_per_s: float, target: float) -> int:
    """For so many requests a second."""
    return max(1, math.ceil(round(requests_per_s / target, 6)))
