"""`adapter_config.json` of PEFT 0.21, as far as serving needs it: rank, scale and everything that must be refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from slipstream.adapters.json_file import read_object
from slipstream.adapters.patterns import Patterns, compile_patterns, compile_whole, first_match, is_ambiguous
from slipstream.adapters.rejection import Rule, reject, show

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # what stands before the base model's own module path in a tensor name
MAX_RANK = 512
MAX_TARGETS = 4096  # every entry is compared with every module

# Options that change the forward pass in a way this platform does not compute: ignoring one would serve a wrong model.
_REFUSED: Mapping[str, str] = {
    "modules_to_save": "train LoRA on those modules instead, if they are linear",
    "trainable_token_indices": "new or retrained tokens are not served",
    "target_parameters": "LoRA on raw parameters (mixture-of-experts weights) is not served",
    "layer_replication": "replicated layers need another base model",
    "use_qalora": "train without QA-LoRA",
    "use_bdlora": "train without block-diagonal LoRA",
    "arrow_config": "publish the adapters one by one, without the Arrow router",
    "alora_invocation_tokens": "activated LoRA is not served; train a plain LoRA",
    "kasa_config": "KaSA changes the base weights; train a plain LoRA",
    "monteclora_config": "train without MonteCLoRA",
    "velora_config": "train without VeLoRA",
    "megatron_config": "convert the adapter to plain LoRA",
    "lora_bias": "train with lora_bias=False",
    "fan_in_fan_out": "bases with transposed linears (GPT-2) are not served",
}
_KNOWN = frozenset(_REFUSED) | {
    "peft_type",
    "peft_version",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
}
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The checked fields. `rank_of` and `scale_of` take a module path as it stands in the base model."""

    base_model: str | None
    r: int
    alpha: float
    rslora: bool
    dora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    target_modules: tuple[str, ...] | re.Pattern[str] | None  # None: "all-linear", or not said; the tensors tell
    layers: frozenset[int] | None  # None: all
    unknown_keys: tuple[str, ...]  # set to something, and not an option of PEFT 0.21

    def rank_of(self, path: str) -> int:
        """The rank of one module, its pattern applied."""
        return first_match(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """alpha/r, or alpha/sqrt(r) for rsLoRA (arXiv 2312.03732), patterns applied."""
        alpha = first_match(self.alpha_pattern, path, self.alpha)
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def has_ambiguous_alpha(self, path: str) -> bool:
        """Whether the order of alpha patterns decides on `path`: PEFT sorts them when it saves, so it may not be the
        order the adapter was trained with."""
        return is_ambiguous(self.alpha_pattern, path)

    def targets(self, path: str) -> bool:
        """Whether PEFT would put a LoRA on `path`; True where only the tensors can tell."""
        names = self.target_modules
        if isinstance(names, re.Pattern):  # PEFT allows no layers_to_transform beside it
            return names.fullmatch(path) is not None
        if names is not None and not any(path == name or path.endswith(f".{name}") for name in names):
            return False
        if names is None or self.layers is None:
            return True
        index = re.match(r".*?\.[^.]*\.(\d+)\.", path)  # PEFT: the first numbered segment is the layer
        return index is not None and int(index[1]) in self.layers


def read_peft_config(path: Path) -> PeftConfig:
    """Read and check `adapter_config.json`. Raises `AdapterRejected`."""
    raw = read_object(path)
    if raw.get("peft_type") != "LORA":
        reject(
            Rule.PEFT_TYPE,
            f"{PEFT_CONFIG} says peft_type {show(raw.get('peft_type'))}; only LORA is served.",
            PEFT_CONFIG,
        )
    _refuse_features(raw)
    ranks = {key: _rank(value, f"rank_pattern[{show(key)}]") for key, value in _table(raw, "rank_pattern").items()}
    alphas = {key: _number(value, f"alpha_pattern[{show(key)}]") for key, value in _table(raw, "alpha_pattern").items()}
    return PeftConfig(
        base_model=_optional_str(raw, "base_model_name_or_path"),
        r=_rank(raw.get("r"), "r"),
        alpha=_number(raw.get("lora_alpha"), "lora_alpha"),
        rslora=_flag(raw, "use_rslora"),
        dora=_flag(raw, "use_dora"),
        rank_pattern=compile_patterns(ranks, "rank_pattern", PEFT_CONFIG),
        alpha_pattern=compile_patterns(alphas, "alpha_pattern", PEFT_CONFIG),
        target_modules=_targets(raw),
        layers=_layers(raw),
        unknown_keys=tuple(sorted(key for key, value in raw.items() if value and key not in _KNOWN)),
    )


def _refuse_features(raw: Mapping[str, object]) -> None:
    for field, advice in _REFUSED.items():
        if raw.get(field):  # null, false and empty lists are PEFT's defaults
            reject(Rule.UNSUPPORTED_FEATURE, f"{PEFT_CONFIG} sets {field}, which is not served: {advice}.", PEFT_CONFIG)
    bias = raw.get("bias", "none")
    if bias != "none":
        message = f"{PEFT_CONFIG} has bias {show(bias)}: trained biases are not served. Train with bias='none'."
        reject(Rule.UNSUPPORTED_FEATURE, message, PEFT_CONFIG)
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        advice = "Save it with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        message = f"{PEFT_CONFIG} has init_lora_weights {show(init)}, which changes the base weights. {advice}."
        reject(Rule.BASE_CHANGING_INIT, message, PEFT_CONFIG)


def _bad(field: str, value: object, want: str) -> NoReturn:
    reject(Rule.BAD_CONFIG_VALUE, f"{PEFT_CONFIG}: {field} is {show(value)}; it must be {want}.", PEFT_CONFIG)


def _rank(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _bad(field, value, "a whole number of at least 1")
    if value > MAX_RANK:
        message = f"{PEFT_CONFIG}: {field} is {show(value)}; ranks over {MAX_RANK} are not served."
        reject(Rule.RANK_TOO_LARGE, message, PEFT_CONFIG)
    return value


def _number(value: object, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        _bad(field, value, "a number")
    if abs(value) > 1e6:  # also keeps away huge integers, which float() cannot hold
        _bad(field, value, "a number of sensible size")
    return float(value)


def _flag(raw: Mapping[str, object], field: str) -> bool:
    value = raw.get(field) or False
    if not isinstance(value, bool):
        _bad(field, value, "true or false")
    return value


def _optional_str(raw: Mapping[str, object], field: str) -> str | None:
    value = raw.get(field) or None
    if value is not None and not isinstance(value, str):
        _bad(field, value, "a string")
    return value


def _table(raw: Mapping[str, object], field: str) -> dict[str, object]:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        _bad(field, value, "an object of module pattern to number")
    return value


def _targets(raw: Mapping[str, object]) -> tuple[str, ...] | re.Pattern[str] | None:
    value = raw.get("target_modules")
    if value is None or (isinstance(value, str) and value.lower() == "all-linear"):
        return None
    if isinstance(value, str):
        return compile_whole(value, "target_modules", PEFT_CONFIG)
    if not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        _bad("target_modules", value, "a list of module names or a string")
    if len(value) > MAX_TARGETS:
        _bad("target_modules", f"{len(value)} names", f"at most {MAX_TARGETS} names")
    return tuple(sorted(str(v) for v in value))


def _layers(raw: Mapping[str, object]) -> frozenset[int] | None:
    value = raw.get("layers_to_transform")
    if value is None or value == [] or raw.get("layers_pattern"):  # a custom pattern is not evaluated: the tensors tell
        return None
    indices = value if isinstance(value, list) else [value]
    if not all(type(v) is int for v in indices):
        _bad("layers_to_transform", value, "a layer number or a list of them")
    return frozenset(indices)
