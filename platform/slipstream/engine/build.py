"""From settings to a model that runs: what every rank of an engine does at its start, in the same order."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from slipstream.engine import loader
from slipstream.engine.config import EngineConfig, FastPath
from slipstream.engine.goodput import RowCosts
from slipstream.engine.memory import keep_freed_memory
from slipstream.engine.parallel.group import Group
from slipstream.engine.parallel.load import load_shard
from slipstream.engine.parallel.ranks import Follower
from slipstream.engine.quantized import Quantization
from slipstream.engine.runner import ModelRunner
from slipstream.errors import ConfigError
from slipstream.protocol import BaseModelSpec

log = logging.getLogger(__name__)

MIN_CONTEXT = 2048  # a KV cache that holds less than this, or than the model's context, is a mistake


@dataclass(frozen=True, slots=True)
class Built:
    """A model ready to run steps."""

    runner: ModelRunner
    tokenizer: PreTrainedTokenizerBase
    spec: BaseModelSpec  # its context length is what is served
    eos_ids: frozenset[int]
    num_blocks: int  # of the KV cache
    costs: RowCosts | None  # None = draft lengths do not adapt


def build(config: EngineConfig, group: Group | None = None) -> Built:
    """Load the model, or this rank's part of it, and measure it. Raises `ConfigError` or `ModelUnsupported`."""
    keep_freed_memory()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if group is None or group.size == 1:
        loaded = loader.load_model(config.model_path, config.dtype, config.device)
    else:
        loaded = load_shard(config.model_path, config.dtype, config.device, group)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.model_path)
    spec = loader.describe(loaded, config.model_id, config.model_path, tokenizer)
    eos = loader.eos_ids(loaded, tokenizer)
    shapes = loader.cache_shapes(loaded)
    block_bytes = sum(2 * h * d for h, d in shapes) * config.block_size * loaded.dtype.itemsize
    num_blocks = config.kv_cache_bytes // block_bytes
    length = _served_length(config, spec.context_length, num_blocks, block_bytes)
    quantize = Quantization(config.quantize) if config.quantize is not None else None
    runner = ModelRunner(
        loaded, num_blocks, config.block_size, eos, config.disable, quantize,
        fully_sharded_loras=config.fully_sharded_loras,
    )  # fmt: skip
    costs = None
    if config.max_draft and FastPath.ADAPTIVE_DRAFTS not in config.disable:
        costs = runner.row_costs(min(config.max_batched_tokens, config.max_num_seqs * (1 + config.max_draft)))
    return Built(runner, tokenizer, dataclasses.replace(spec, context_length=length), eos, num_blocks, costs)


def follow(config: EngineConfig, follower: Follower) -> None:
    """The life of a rank from 1 on; returns when rank 0 has hung up. Raises when this process is of no more use."""
    group = follower.meet(loader.pick_device(config.device))
    follower.follow(build(config, group).runner)


def _served_length(config: EngineConfig, context: int, num_blocks: int, block_bytes: int) -> int:
    """Tokens of the longest sequence served: the model's context, a lower `max_model_len`, or what the KV cache holds."""
    held = num_blocks * config.block_size
    wanted = min(config.max_model_len or context, context)
    if held >= wanted:
        return wanted
    least = wanted if config.max_model_len is not None else min(context, MIN_CONTEXT)
    if held < least:
        raise ConfigError(
            f"kv_cache_bytes holds {held} tokens, fewer than {least}; give it at least "
            f"{-(-least // config.block_size) * block_bytes} bytes, or set a lower max_model_len."
        )
    log.warning(
        "the KV cache holds %d tokens: longer sequences are refused, though the model could take %d", held, context
    )
    return held
