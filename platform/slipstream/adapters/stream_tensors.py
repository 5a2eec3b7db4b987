"""Every stream tensor against what the speculator's configuration promises."""

from __future__ import annotations

import re
from collections.abc import Mapping

from slipstream.adapters.rejection import Rule, reject, show
from slipstream.adapters.tensor_file import TensorInfo
from slipstream.adapters.turbo_config import StreamConfig, reject_medusa_v1

_OWN = re.compile(r"turbo\.([0-9]{1,3})\.(A|B|C|weight|bias)")
_LORAX = re.compile(r"([0-9]{1,3})\.0\.linear\.(weight|bias)")


def check_streams(tensors: Mapping[str, TensorInfo], config: StreamConfig, hidden: int) -> None:
    """Raise `AdapterRejected` unless `tensors` are exactly the streams that `config` describes, of width `hidden`."""
    pattern = _OWN if config.own_layout else _LORAX
    numbers = set()
    for name, tensor in tensors.items():
        if not config.own_layout and re.fullmatch(r"[0-9]+\.[0-9]+\.weight", name):
            reject_medusa_v1(f"{tensor.file} holds {show(name)}, an LM head of its own", tensor.file)
        match = pattern.fullmatch(name)
        if match is None:
            message = f"{tensor.file}: {show(name)} is no part of a stream and would be ignored. Remove it."
            reject(Rule.UNKNOWN_TENSOR, message, tensor.file)
        numbers.add(int(match[1]))
    if numbers != set(range(config.num_streams)):
        message = f"{config.file} promises {config.num_streams} streams, but the tensors hold {sorted(numbers)[:16]}."
        reject(Rule.NUM_STREAMS, f"{message} Streams count from 0. Make the two agree.", config.file)
    _check_shapes(tensors, config, hidden)


def _check_shapes(tensors: Mapping[str, TensorInfo], config: StreamConfig, hidden: int) -> None:
    wanted = config.shapes(hidden)
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
