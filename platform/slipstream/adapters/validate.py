"""`inspect_adapter`: one folder, every rule, before anything of it is visible. Torch-free, for the gateway's process.

The rules and their codes are `slipstream.adapters.rejection.Rule`; `rules_table()` prints them for the README. Layouts:

    PEFT LoRA    adapter_config.json + adapter_model.safetensors
    own Turbo    [PEFT LoRA +] turbo_config.json + turbo_streams.safetensors
    LoRAX Turbo  [PEFT LoRA +] config.json (Medusa, version 2) + any other *.safetensors
    Medusa-1     [PEFT LoRA +] config.json (Medusa, version 1) + any other *.safetensors, with LM heads
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapter_registry.records import AdapterKind, FileEntry, PromptFormat
from slipstream.adapters.chat_template import read_chat_template
from slipstream.adapters.folder import DEFAULT_MAX_BYTES, Listing, list_folder
from slipstream.adapters.lora_tensors import check_lora, missing_targets
from slipstream.adapters.peft_config import PEFT_CONFIG, PEFT_TENSORS, PeftConfig, read_peft_config
from slipstream.adapters.rejection import Rule, reject, show
from slipstream.adapters.stream_tensors import check_streams
from slipstream.adapters.tensor_file import TensorInfo, check_finite, read_tensor_file
from slipstream.adapters.turbo_config import (
    LORAX_CONFIG,
    SLIPSTREAM_CONFIG,
    TURBO_CONFIG,
    TURBO_TENSORS,
    Options,
    StreamConfig,
    check_rates,
    read_options,
    read_stream_config,
)
from slipstream.protocol import BaseModelSpec

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """What a folder holds, once it has passed every rule."""

    kind: AdapterKind
    base_model: str  # as the adapter names it
    base_digest: str | None  # None: the adapter names only a model id
    rank: int  # largest LoRA rank; 0 without a LoRA
    num_streams: int
    stream_rank: int | None  # None: dense, or no streams
    acceptance: tuple[float, ...]
    prompt_format: PromptFormat
    target_modules: tuple[str, ...]  # last parts of the adapted modules' paths
    files: tuple[FileEntry, ...]  # config and tensors: these make the digest
    attachments: tuple[FileEntry, ...]  # everything else that may stay
    warnings: tuple[str, ...]
    chat_template: str | None


def inspect_adapter(folder: Path, base: BaseModelSpec, *, max_bytes: int = DEFAULT_MAX_BYTES) -> InspectedAdapter:
    """Check `folder` against every rule and `base`. Raises `AdapterRejected`: code = the rule, param = the file."""
    listing = list_folder(folder, max_bytes)
    _check_layout(listing)
    peft = read_peft_config(folder / PEFT_CONFIG) if listing.has(PEFT_CONFIG) else None
    streams = read_stream_config(folder)
    listing = _assign(listing, peft, streams)
    options = read_options(folder / SLIPSTREAM_CONFIG) if listing.has(SLIPSTREAM_CONFIG) else Options()
    base_model, base_digest, warnings = _check_base(peft, streams, options, base)
    tensors = {name: read_tensor_file(folder / name) for name in listing.tensors}
    modules: dict[str, int] = {}
    if peft is not None:
        modules = check_lora(tensors[PEFT_TENSORS], peft, base)
        warnings += _lora_warnings(modules, peft)
    if streams is not None:
        check_streams(_merge(held for name, held in tensors.items() if name != PEFT_TENSORS), streams, base)
    own_rates = check_rates(options.acceptance, streams.num_streams if streams else 0, SLIPSTREAM_CONFIG)
    for name, held in tensors.items():
        check_finite(folder / name, held)
    return InspectedAdapter(
        kind=_kind(peft, streams),
        base_model=base_model,
        base_digest=base_digest,
        rank=max(modules.values(), default=0),
        num_streams=streams.num_streams if streams else 0,
        stream_rank=streams.stream_rank if streams else None,
        acceptance=(streams and streams.acceptance) or own_rates,
        prompt_format=(streams and streams.prompt_format) or options.prompt_format or PromptFormat.RAW,
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in modules})),
        files=tuple(_entry(folder / name) for name in sorted((*listing.configs, *listing.tensors))),
        attachments=tuple(_entry(folder / name) for name in listing.attachments),
        warnings=warnings,
        chat_template=read_chat_template(listing),
    )


def _check_layout(listing: Listing) -> None:
    """A config without its tensors, or the other way round, before anything is read."""
    for config, tensors in ((PEFT_CONFIG, PEFT_TENSORS), (TURBO_CONFIG, TURBO_TENSORS)):
        if listing.has(config) != listing.has(tensors):
            there, absent = (config, tensors) if listing.has(config) else (tensors, config)
            reject(Rule.MISSING_FILE, f"{there} is there, but {absent} is not. Publish both.", absent)


def _assign(listing: Listing, peft: PeftConfig | None, streams: StreamConfig | None) -> Listing:
    """Refuse tensors that no config claims, and make a `config.json` that is not Medusa's an attachment."""
    lorax = streams is not None and not streams.own_layout
    others = [name for name in listing.tensors if name not in (PEFT_TENSORS, TURBO_TENSORS)]
    if others and not lorax:
        advice = f"Remove it, or add the {LORAX_CONFIG} with medusa_num_heads that describes it"
        reject(Rule.MISSING_FILE, f"No configuration says what {others[0]} holds. {advice}.", others[0])
    if lorax and not others:
        advice = "Publish the streams' .safetensors file too"
        reject(Rule.MISSING_FILE, f"{LORAX_CONFIG} describes streams, but no file holds them. {advice}.", LORAX_CONFIG)
    if peft is None and streams is None:
        reject(Rule.EMPTY_FOLDER, f"The folder has neither {PEFT_CONFIG} nor {TURBO_CONFIG}: it holds no adapter.")
    if lorax or not listing.has(LORAX_CONFIG):
        return listing
    configs = tuple(name for name in listing.configs if name != LORAX_CONFIG)
    return Listing(listing.folder, configs, listing.tensors, tuple(sorted((*listing.attachments, LORAX_CONFIG))))


def _check_base(
    peft: PeftConfig | None, streams: StreamConfig | None, options: Options, base: BaseModelSpec
) -> tuple[str, str | None, tuple[str, ...]]:
    """What the adapter calls its base, the digest it names, and a warning if it names none."""
    names = {PEFT_CONFIG: peft.base_model if peft else None}
    if streams is not None:
        names[streams.file] = streams.base_model
    digests = {TURBO_CONFIG: streams.base_digest if streams else None, SLIPSTREAM_CONFIG: options.base_digest}
    named = {file: name for file, name in names.items() if name}
    for file, name in named.items():
        if len(name) > 512 or not name.isprintable():  # it goes into records and headers
            reject(Rule.BAD_CONFIG_VALUE, f"{file}: the base model's name {show(name)} is not a model id.", file)
    for file, digest in digests.items():
        if digest is not None and digest != base.base_digest:
            message = f"{file} names base {digest}, but this model is {base.base_digest} ({base.id})."
            reject(Rule.BASE_MISMATCH, f"{message} Publish to the base it was trained on.", file)
    digest = next((d for d in digests.values() if d is not None), None)
    if digest is not None:  # it decides alone: names are free text
        return next(iter(named.values()), base.id), digest, ()
    if not named:
        advice = "Set base_model_name_or_path"
        reject(Rule.BASE_MISSING, f"No file says which base model the adapter is for. {advice}.", PEFT_CONFIG)
    for file, name in named.items():
        if _last_part(name) != _last_part(base.id):
            message = f"{file} names the base {show(name)}, but this model is {show(base.id)}."
            reject(Rule.BASE_MISMATCH, f"{message} Publish to the base it was trained on.", file)
    name = next(iter(named.values()))
    warning = f"The adapter names its base only as {show(name)}: that its weights are the same cannot be checked."
    return name, None, (warning,)


def _last_part(model_id: str) -> str:
    return re.split(r"[/\\]", model_id.rstrip("/\\"))[-1].lower()


def _lora_warnings(modules: dict[str, int], peft: PeftConfig) -> tuple[str, ...]:
    found: list[str] = []
    missing = missing_targets(modules, peft)
    if missing:
        found.append(f"target_modules names {_some(missing)}, but no tensor adapts such a module.")
    ambiguous = next((path for path in modules if peft.has_ambiguous_alpha(path)), None)
    if ambiguous is not None:
        message = f"Alpha patterns disagree about {ambiguous}, and PEFT sorts them when it saves: the first one counts."
        found.append(f"{message} Write one pattern per module to be sure of the scale.")
    if peft.unknown_keys:
        found.append(
            f"{PEFT_CONFIG} sets options that this release does not know and leaves aside: {_some(peft.unknown_keys)}."
        )
    return tuple(found)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join([*map(show, names[:8]), *(["…"] if len(names) > 8 else [])])


def _merge(files: Iterable[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """The stream tensors of all files by name; LoRAX reads them the same way, but the last one silently wins there."""
    merged: dict[str, TensorInfo] = {}
    for held in files:
        for name, tensor in held.items():
            if name in merged:
                message = f"{show(name)} is in {merged[name].file} and in {tensor.file}. Keep one of them."
                reject(Rule.DUPLICATE_TENSOR, message, tensor.file)
            merged[name] = tensor
    return merged


def _kind(peft: PeftConfig | None, streams: StreamConfig | None) -> AdapterKind:
    if streams is None:
        return AdapterKind.LORA
    if streams.own_heads:
        return AdapterKind.MEDUSA
    return AdapterKind.TURBO if peft is None else AdapterKind.TURBO_LORA


def _entry(path: Path) -> FileEntry:
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
            size += len(block)
    return FileEntry(path=path.name, size=size, sha256=sha256.hexdigest())
