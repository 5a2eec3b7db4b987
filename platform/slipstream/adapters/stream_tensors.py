"""Every stream tensor against what the speculator's configuration promises."""

from __future__ import annotations

import re
from collections.abc import Mapping

from slipstream.adapters.rejection import Rule, reject, show
from slipstream.adapters.tensor_file import TensorInfo
from slipstream.adapters.turbo_config import StreamConfig, reject_medusa_layers
from slipstream.protocol import BaseModelSpec

_OWN = re.compile(r"turbo\.([0-9]{1,3})\.(A|B|C|weight|bias)")
_LORAX = re.compile(r"([0-9]{1,3})\.(?:0\.linear\.(?:weight|bias)|1\.weight)")
_LM_HEAD = re.compile(r"[0-9]{1,3}\.1\.weight")
_DEEPER = re.compile(r"[0-9]{1,3}\.(?:[1-9][0-9]{0,2}\.linear\.(?:weight|bias)|(?:[2-9]|[1-9][0-9]{1,2})\.weight)")


def check_streams(tensors: Mapping[str, TensorInfo], config: StreamConfig, base: BaseModelSpec) -> None:
    """Raise `AdapterRejected` unless `tensors` are exactly the streams that `config` describes, in the base's sizes."""
    pattern = _OWN if config.own_layout else _LORAX
    if not config.own_layout:
        _check_medusa(tensors, config)
    numbers = set()
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            message = f"{tensor.file}: {show(name)} is no part of a stream and would be ignored. Remove it."
            reject(Rule.UNKNOWN_TENSOR, message, tensor.file)
        numbers.add(int(match[1]))
    if numbers != set(range(config.num_streams)):
        message = f"{config.file} promises {config.num_streams} streams, but the tensors hold {sorted(numbers)[:16]}."
        reject(Rule.NUM_STREAMS, f"{message} Streams count from 0. Make the two agree.", config.file)
    _check_shapes(tensors, config, base)


def _check_medusa(tensors: Mapping[str, TensorInfo], config: StreamConfig) -> None:
    """Deeper heads, and a version that says something else than the tensors: LoRAX goes by the tensors, silently."""
    deeper = next((t for name, t in sorted(tensors.items()) if _DEEPER.fullmatch(name)), None)
    if deeper is not None:
        reject_medusa_layers(f"{deeper.file} holds {show(deeper.name)}, part of a deeper head", deeper.file)
    head = next((t for name, t in sorted(tensors.items()) if _LM_HEAD.fullmatch(name)), None)
    if config.own_heads and head is None:
        message = f'{config.file} has version 1 (LoRAX\'s default), but no tensor is an LM head. Set "version": "2".'
        reject(Rule.MEDUSA_VERSION, message, config.file)
    if head is not None and not config.own_heads:
        message = f"{config.file} has version 2, but {head.file} holds {show(head.name)}, an LM head of its own."
        reject(Rule.MEDUSA_VERSION, f'{message} Set "version": "1", or remove the LM heads.', config.file)


def _check_shapes(tensors: Mapping[str, TensorInfo], config: StreamConfig, base: BaseModelSpec) -> None:
    wanted = config.shapes(base.hidden_size, base.vocab_size)
    for name, shape in wanted.items():
        if name not in tensors:
            message = f"The stream tensor {name} is missing, which {config.file} calls for. Save the streams again."
            reject(Rule.MISSING_TENSOR, message, config.file)
        if tensors[name].shape != shape:
            message = f"{name} has shape {list(tensors[name].shape)}; this base and {config.file} need {list(shape)}."
            reject(Rule.WRONG_SHAPE, f"{message} Were the streams trained for another base?", tensors[name].file)
    for name in sorted(set(tensors) - set(wanted)):
        message = f"{name} does not fit stream_rank and conditioned of {config.file} and would be ignored."
        reject(Rule.UNKNOWN_TENSOR, f"{message} Make the two agree.", tensors[name].file)
