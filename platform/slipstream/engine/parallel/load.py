"""Loading one rank's share of a base model: the files are read slice by slice, no rank ever holds the whole."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from slipstream.engine import attention
from slipstream.engine.loader import LoadedModel, adopt_model, pick_device, pick_dtype
from slipstream.engine.parallel.group import Group
from slipstream.engine.parallel.shards import Shards
from slipstream.errors import ModelUnsupported


class VocabEmbedding(nn.Module):
    """Embeddings cut by the vocabulary: each rank looks up its own ids, and the sum has them all."""

    def __init__(self, own: nn.Module, shards: Shards) -> None:
        super().__init__()
        self.own = own
        self._ids = shards.own_vocab
        self._group = shards.group

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [...] → [..., H], the same on every rank."""
        outside = (ids < self._ids.start) | (ids >= self._ids.stop)
        found = self.own((ids - self._ids.start).masked_fill(outside, 0))
        found = found.masked_fill(outside.unsqueeze(-1), 0.0)
        self._group.all_reduce_(found)
        return found  # type: ignore[no-any-return]


def load_shard(path: str, dtype: str, device: str, group: Group) -> LoadedModel:
    """This rank's part of a model folder. Raises `ConfigError` for a wrong degree and `ModelUnsupported`."""
    from accelerate import init_empty_weights  # noqa: PLC0415  # slow to import, and only ranks of a group need it

    config = AutoConfig.from_pretrained(path)
    text = config.get_text_config()
    if text is not config:
        raise ModelUnsupported(f"{path} is more than a language model. Use tensor_parallel_size 1.")
    target = pick_device(device)
    shards = Shards.of(config, group, Path(path).name)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            shards.config, dtype=pick_dtype(dtype, target), attn_implementation=attention.register()
        )
    whole = _fill(model, Path(path), shards)
    model.tie_weights()
    model.to(target)
    model.set_input_embeddings(VocabEmbedding(model.get_input_embeddings(), shards))
    return adopt_model(model, shards, whole)


def _fill(model: PreTrainedModel, folder: Path, shards: Shards) -> dict[str, tuple[int, int]]:
    """Read every parameter's part; returns the whole shape (out, in) of each linear."""
    tied: Mapping[str, str] = getattr(model, "_tied_weights_keys", None) or {}
    tied = tied if model.config.tie_word_embeddings else {}
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    whole: dict[str, tuple[int, int]] = {}
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            where |= dict.fromkeys(opened.keys(), opened)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            stored = name if name in where else tied.get(name, name)
            if stored not in where:
                raise ModelUnsupported(f"{folder.name} has no tensor {name!r}: it cannot be loaded by shards.")
            source = where[stored].get_slice(stored)
            module, _, leaf = name.rpartition(".")
            if module in linears and leaf == "weight":
                whole[module] = tuple(source.get_shape())
            value = _part(source, module, leaf, shards)
            if value.shape != parameter.shape:
                raise ModelUnsupported(
                    f"{name!r} of {folder.name} cannot be shared out: a part of it has shape {tuple(parameter.shape)}, and "
                    f"{tuple(value.shape)} was read. Use tensor_parallel_size 1."
                )
            owner = model.get_submodule(module)
            setattr(owner, leaf, nn.Parameter(value.to(parameter.dtype), requires_grad=False))
    return whole


def _part(source: Any, module: str, leaf: str, shards: Shards) -> torch.Tensor:
    """A rank's part of a stored tensor."""
    cut = shards.cut(module)
    if cut.rows is not None:
        return torch.cat([source[part.start : part.stop] for part in cut.rows])
    if cut.columns is not None and leaf == "weight":
        part: torch.Tensor = source[:, cut.columns.start : cut.columns.stop].contiguous()
        return part
    value: torch.Tensor = source[:]
    # A bias after a sum over ranks is added by one of them.
    return torch.zeros_like(value) if cut.columns is not None and shards.group.rank else value
