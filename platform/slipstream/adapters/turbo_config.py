"""The speculator's configuration, in our own layout (`turbo_config.json`) and in LoRAX's (a Medusa `config.json`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from adapter_registry.records import DIGEST_PATTERN, PromptFormat
from slipstream.adapters.json_file import read_object
from slipstream.adapters.rejection import Rule, reject, show

TURBO_CONFIG = "turbo_config.json"
TURBO_TENSORS = "turbo_streams.safetensors"
LORAX_CONFIG = "config.json"
LORAX_TENSORS = "medusa_lm_head.safetensors"  # the name we write; LoRAX reads every .safetensors of the folder
SLIPSTREAM_CONFIG = "slipstream.json"
FORMAT_VERSION = 1
MAX_STREAMS = 8
MAX_STREAM_RANK = 1024
_TURBO_KEYS = frozenset(
    {
        "format_version",
        "base_model",
        "base_digest",
        "num_streams",
        "stream_rank",
        "conditioned",
        "acceptance",
        "prompt_format",
    }
)


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """A speculator, whatever its layout. `stream_rank` is None for dense streams.

    `own_heads`: each stream has an LM head of its own (Medusa version 1) instead of the base's.
    """

    file: str  # the configuration it came from
    own_layout: bool
    base_model: str | None
    base_digest: str | None
    num_streams: int
    stream_rank: int | None
    conditioned: bool
    acceptance: tuple[float, ...]
    prompt_format: PromptFormat | None  # None: not said here
    own_heads: bool = False

    def shapes(self, hidden: int, vocab: int) -> dict[str, tuple[int, ...]]:
        """Every tensor that the folder must hold, with its shape; `vocab` counts the base's LM-head rows."""
        parts: dict[str, tuple[int, ...]] = {"bias": (hidden,)}
        if self.stream_rank is None:
            parts["weight"] = (hidden, hidden)
        else:
            parts |= {"A": (self.stream_rank, hidden), "B": (hidden, self.stream_rank)}
            if self.conditioned:
                parts["C"] = (self.stream_rank, hidden)
        if self.own_heads:
            parts["head"] = (vocab, hidden)
        return {self.key(k, part): shape for k in range(self.num_streams) for part, shape in parts.items()}

    def key(self, stream: int, part: str) -> str:
        """The tensor name of one part (`weight`, `bias`, `A`, `B`, `C`, `head`) of one stream."""
        if self.own_layout:
            return f"turbo.{stream}.{part}"
        return f"{stream}.1.weight" if part == "head" else f"{stream}.0.linear.{part}"


@dataclass(frozen=True, slots=True)
class Options:
    """`slipstream.json`: what a plain PEFT or LoRAX folder cannot say."""

    prompt_format: PromptFormat | None = None
    base_digest: str | None = None
    acceptance: tuple[float, ...] = ()  # how many there must be, only the speculator tells


def read_turbo_config(path: Path) -> StreamConfig:
    """Read and check `turbo_config.json`. Raises `AdapterRejected`."""
    raw = read_object(path)
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        advice = f"This release reads version {FORMAT_VERSION}: publish with a matching release"
        reject(Rule.TURBO_VERSION, f"{TURBO_CONFIG} has format_version {show(version)}. {advice}.", TURBO_CONFIG)
    _check_keys(raw, _TURBO_KEYS, TURBO_CONFIG)
    base_model = raw.get("base_model")
    if not isinstance(base_model, str) or not base_model:
        reject(Rule.BASE_MISSING, f"{TURBO_CONFIG} must name its base_model.", TURBO_CONFIG)
    num_streams = _num_streams(raw.get("num_streams"), "num_streams", TURBO_CONFIG)
    rank = _stream_rank(raw.get("stream_rank", 0))
    conditioned = raw.get("conditioned", False)
    if not isinstance(conditioned, bool) or (conditioned and rank is None):
        _bad(TURBO_CONFIG, "conditioned", conditioned, "true or false, and false for dense streams")
    return StreamConfig(
        file=TURBO_CONFIG,
        own_layout=True,
        base_model=base_model,
        base_digest=_digest(raw.get("base_digest"), TURBO_CONFIG),
        num_streams=num_streams,
        stream_rank=rank,
        conditioned=conditioned,
        acceptance=check_rates(_rates(raw.get("acceptance"), TURBO_CONFIG), num_streams, TURBO_CONFIG),
        prompt_format=_prompt_format(raw.get("prompt_format"), TURBO_CONFIG),
    )


def is_medusa(raw: Mapping[str, object]) -> bool:
    """Whether a `config.json` is LoRAX's Medusa kind and not, say, a copy of the base model's."""
    return "medusa_num_heads" in raw


def read_lorax_config(path: Path) -> StreamConfig:
    """Read and check a Medusa `config.json`: version 2 streams share the base's LM head, version 1 bring their own."""
    raw = read_object(path)
    heads = _num_streams(raw.get("medusa_num_heads"), "medusa_num_heads", LORAX_CONFIG)
    layers = raw.get("medusa_num_layers", 1)
    try:
        version = float(str(raw.get("version", 1)))
    except ValueError:
        _bad(LORAX_CONFIG, "version", raw.get("version"), '"1" or "2"')
    if layers != 1:
        reject_medusa_layers(f"{LORAX_CONFIG} has medusa_num_layers {show(layers)}", LORAX_CONFIG)
    if not (version == 1 or version >= 2):
        advice = "Version 1 brings its own LM heads, version 2 shares the base's"
        reject(Rule.MEDUSA_VERSION, f"{LORAX_CONFIG} has version {version:g}. {advice}: say which.", LORAX_CONFIG)
    base = raw.get("base_model_name_or_path") or None
    if base is not None and not isinstance(base, str):
        _bad(LORAX_CONFIG, "base_model_name_or_path", base, "a string")
    return StreamConfig(LORAX_CONFIG, False, base, None, heads, None, False, (), None, own_heads=version == 1)


def read_stream_config(folder: Path) -> StreamConfig | None:
    """The folder's speculator in either layout, or None. Raises `AdapterRejected`, also for two of them."""
    lorax = folder / LORAX_CONFIG
    medusa = lorax.is_file() and is_medusa(read_object(lorax))
    if not (folder / TURBO_CONFIG).is_file():
        return read_lorax_config(lorax) if medusa else None
    if medusa:
        message = f"The folder has a {TURBO_CONFIG} and a Medusa {LORAX_CONFIG}. Keep one speculator."
        reject(Rule.TWO_SPECULATORS, message, LORAX_CONFIG)
    return read_turbo_config(folder / TURBO_CONFIG)


def read_options(path: Path) -> Options:
    """Read and check `slipstream.json`. Raises `AdapterRejected`."""
    raw = read_object(path)
    _check_keys(raw, frozenset({"prompt_format", "base_digest", "acceptance"}), SLIPSTREAM_CONFIG)
    prompt_format = _prompt_format(raw.get("prompt_format"), SLIPSTREAM_CONFIG)
    rates = _rates(raw.get("acceptance"), SLIPSTREAM_CONFIG)
    return Options(prompt_format, _digest(raw.get("base_digest"), SLIPSTREAM_CONFIG), rates)


def check_rates(rates: tuple[float, ...], num_streams: int, file: str) -> tuple[float, ...]:
    """The acceptance rates as they are. Raises `AdapterRejected` unless there are none, or one per stream."""
    if rates and not num_streams:
        reject(Rule.BAD_ACCEPTANCE, f"{file} has acceptance rates, but the folder holds no streams. Remove them.", file)
    if len(rates) not in (0, num_streams):
        message = f"{file}: acceptance must be a list of {num_streams} rates, one per stream, or empty."
        reject(Rule.BAD_ACCEPTANCE, message, file)
    return rates


def reject_medusa_layers(finding: str, file: str) -> NoReturn:
    """Refuse deeper Medusa heads by name."""
    reason = "Only heads of one residual layer are served"
    reject(Rule.MEDUSA_LAYERS, f"{finding}. {reason}: train with medusa_num_layers 1.", file)


def _bad(file: str, field: str, value: object, want: str) -> NoReturn:
    reject(Rule.BAD_CONFIG_VALUE, f"{file}: {field} is {show(value)}; it must be {want}.", file)


def _check_keys(raw: Mapping[str, object], known: frozenset[str], file: str) -> None:
    unknown = sorted(set(raw) - known)
    if unknown:
        known_list = ", ".join(sorted(known))
        reject(Rule.UNKNOWN_KEY, f"{file} has the unknown key {show(unknown[0])}; it may have {known_list}.", file)


def _num_streams(value: object, field: str, file: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_STREAMS:
        reject(Rule.NUM_STREAMS, f"{file}: {field} is {show(value)}; it must be 1 to {MAX_STREAMS}.", file)
    return value


def _stream_rank(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_STREAM_RANK:
        _bad(TURBO_CONFIG, "stream_rank", value, f"1 to {MAX_STREAM_RANK}, or null for dense streams")
    return value


def _digest(value: object, file: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(DIGEST_PATTERN, value):
        _bad(file, "base_digest", value, "`sha256:` and 64 hexadecimal digits, or null")
    return value


def _rates(value: object, file: str) -> tuple[float, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        reject(Rule.BAD_ACCEPTANCE, f"{file}: acceptance must be a list of rates, one per stream, or empty.", file)
    for rate in value:
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
            reject(Rule.BAD_ACCEPTANCE, f"{file}: acceptance holds {show(rate)}; a rate is between 0 and 1.", file)
    return tuple(float(rate) for rate in value)


def _prompt_format(value: object, file: str) -> PromptFormat | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in {f.value for f in PromptFormat}:
        _bad(file, "prompt_format", value, "raw or chat")
    return PromptFormat(value)
