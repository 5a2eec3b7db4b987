"""Every tensor of `adapter_model.safetensors` mapped to a linear of the base, or refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

from slipstream.adapters.peft_config import PEFT_CONFIG, PEFT_PREFIX, PEFT_TENSORS, PeftConfig
from slipstream.adapters.rejection import Rule, reject, show
from slipstream.adapters.tensor_file import TensorInfo
from slipstream.protocol import BaseModelSpec

_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_KEY = re.compile(rf"{re.escape(PEFT_PREFIX)}(?P<path>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})", re.DOTALL)


def check_lora(tensors: Mapping[str, TensorInfo], config: PeftConfig, base: BaseModelSpec) -> dict[str, int]:
    """The rank of every adapted module, by its path in the base. Raises `AdapterRejected`."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            _reject_name(name)
        path = match["path"]
        if path not in base.linears:
            _reject_module(path, base)
        modules.setdefault(path, {})[match["part"]] = tensor
    if not modules:
        advice = "Save the trained adapter with save_pretrained"
        reject(Rule.NO_LORA_TENSORS, f"{PEFT_TENSORS} holds no LoRA tensors. {advice}.", PEFT_TENSORS)
    for path, parts in modules.items():
        _check_module(path, parts, config, base.linears[path])
    return {path: config.rank_of(path) for path in sorted(modules)}


def missing_targets(modules: Mapping[str, int], config: PeftConfig) -> tuple[str, ...]:
    """The entries of `target_modules` that no adapted module answers to."""
    names = config.target_modules if isinstance(config.target_modules, tuple) else ()
    return tuple(name for name in names if not any(p == name or p.endswith(f".{name}") for p in modules))


def _check_module(path: str, parts: Mapping[str, TensorInfo], config: PeftConfig, linear: tuple[int, int]) -> None:
    if not config.targets(path):
        message = f"{PEFT_TENSORS} adapts {path}, which target_modules and layers_to_transform leave out."
        reject(Rule.NOT_TARGETED, f"{message} Make {PEFT_CONFIG} and the tensors agree.", PEFT_TENSORS)
    for part in _PARTS[:2]:
        if part not in parts:
            reject(
                Rule.UNPAIRED_TENSOR, f"{path} has no {part} in {PEFT_TENSORS}. Save the adapter again.", PEFT_TENSORS
            )
    if (_PARTS[2] in parts) != config.dora:
        has = "has" if _PARTS[2] in parts else "lacks"
        message = f"{path} {has} lora_magnitude_vector, but use_dora is {str(config.dora).lower()} in {PEFT_CONFIG}."
        reject(Rule.DORA_MISMATCH, f"{message} Save the adapter again with its own config.", PEFT_TENSORS)
    rank, (out, inp) = config.rank_of(path), linear
    found = parts[_PARTS[0]].shape
    if len(found) == 2 and found[1] == inp and found[0] != rank:
        message = f"lora_A of {path} has rank {found[0]}, but r and rank_pattern of {PEFT_CONFIG} say {rank}."
        reject(Rule.RANK_MISMATCH, f"{message} Save the adapter again with its own config.", PEFT_TENSORS)
    for part, want in zip(_PARTS, ((rank, inp), (out, rank), (out,)), strict=True):
        if part in parts and parts[part].shape != want:
            message = f"{part} of {path} has shape {list(parts[part].shape)}; this base and rank need {list(want)}."
            reject(Rule.WRONG_SHAPE, f"{message} Was it trained for another base model?", PEFT_TENSORS)


def _reject_module(path: str, base: BaseModelSpec) -> NoReturn:
    kinds = ", ".join(sorted({known.rpartition(".")[2] for known in base.linears})[:16])
    example = next(iter(base.linears), "none")
    message = f"{PEFT_TENSORS} adapts {show(path)}, which {show(base.id)} does not have as a linear."
    reject(Rule.UNKNOWN_MODULE, f"{message} It has {kinds}, such as {example}.", PEFT_TENSORS)


def _reject_name(name: str) -> NoReturn:
    """Say what is wrong with a tensor name: the frequent mistakes have a code of their own."""
    where = f"{PEFT_TENSORS}: {show(name)}"
    if "lora_embedding_" in name:
        message = f"{where} is a LoRA on an embedding, which is not served. Train linear modules only."
        reject(Rule.EMBEDDING_WEIGHTS, message, PEFT_TENSORS)
    if re.search(r"\.lora_[AB]\.bias$", name):
        message = f"{where} is a trained LoRA bias. Train with lora_bias=False."
        reject(Rule.UNSUPPORTED_FEATURE, message, PEFT_TENSORS)
    if re.search(r"\.lora_([AB]|magnitude_vector)\.(?!weight$)[^.]+(\.weight)?$", name):
        message = f"{where} still carries the adapter's name, as in a raw state dict."
        reject(Rule.ADAPTER_NAME_IN_KEY, f"{message} Save with PeftModel.save_pretrained.", PEFT_TENSORS)
    if name.endswith(_PARTS):
        message = f"{where} does not start with {PEFT_PREFIX}<module path>."
        reject(Rule.WRONG_PREFIX, f"{message} Save with PeftModel.save_pretrained.", PEFT_TENSORS)
    if re.search(r"(^|\.)(modules_to_save|base_layer|embed_tokens|lm_head|wte)\.", name):
        message = f"{where} is a copy of a base weight; adapters share the base's."
        reject(Rule.EMBEDDING_WEIGHTS, f"{message} Save with save_embedding_layers=False.", PEFT_TENSORS)
    reject(Rule.UNKNOWN_TENSOR, f"{where} is no part of a LoRA and would be ignored. Remove it.", PEFT_TENSORS)
