"""safetensors headers and contents checked without torch, and stricter than the library: see `read_tensor_file`."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from slipstream.adapters.json_file import parse_object
from slipstream.adapters.rejection import Rule, reject, show

MAX_HEADER_BYTES = 8 << 20
_CHUNK_ELEMENTS = 1 << 22
# dtype -> (unsigned integer of the same width, its exponent bits): all exponent bits set means infinity or NaN
_DTYPES: dict[str, tuple[str, int]] = {"F32": ("<u4", 0x7F80_0000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header: `start` and `stop` are byte offsets in the file."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_tensor_file(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, every byte accounted for: no overlap, no gap, nothing behind.

    Raises `AdapterRejected` for a malformed file, a dtype other than F32, F16 and BF16, and tensors without elements.
    """
    file, size = path.name, path.stat().st_size
    base, header = _read_header(path, size)
    header.pop("__metadata__", None)  # free text; safetensors itself checks its type below
    tensors = {name: _parse_entry(file, name, entry, base) for name, entry in header.items()}
    _check_cover(file, list(tensors.values()), base, size)
    try:
        with safe_open(path, framework="numpy") as opened:  # a second opinion by the reader that will load it
            known = set(opened.keys())
    except SafetensorError:
        reject(Rule.BAD_HEADER, f"{file} is not a valid safetensors file. Save the adapter again.", file)
    if known != set(tensors):
        reject(Rule.BAD_HEADER, f"{file} is not a valid safetensors file. Save the adapter again.", file)
    return tensors


def check_finite(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Raise `AdapterRejected` naming the first tensor with NaN or infinity; reads 4 M elements at a time."""
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        code, exponent = _DTYPES[tensor.dtype]
        count = (tensor.stop - tensor.start) // np.dtype(code).itemsize
        with path.open("rb") as file:
            file.seek(tensor.start)
            for first in range(0, count, _CHUNK_ELEMENTS):
                bits = np.fromfile(file, dtype=code, count=min(_CHUNK_ELEMENTS, count - first))
                if bool(((bits & exponent) == exponent).any()):
                    advice = "Training has diverged: publish an earlier checkpoint"
                    reject(
                        Rule.NON_FINITE, f"{path.name}: {show(tensor.name)} holds NaN or infinity. {advice}.", path.name
                    )


def _read_header(path: Path, size: int) -> tuple[int, dict[str, object]]:
    """The offset of the first tensor byte, and the raw header."""
    name = path.name
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            reject(Rule.TRUNCATED_FILE, f"{name} has only {size} bytes: it is cut off. Upload it again.", name)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            reject(Rule.HEADER_TOO_LARGE, f"{name} claims a header of {length} bytes. Is it a safetensors file?", name)
        raw = file.read(length)
    if len(raw) < length:
        reject(Rule.TRUNCATED_FILE, f"{name} is cut off inside its header. Upload it again.", name)
    return 8 + length, parse_object(raw, name, Rule.BAD_HEADER)


def _parse_entry(file: str, name: str, entry: object, base: int) -> TensorInfo:
    """One header entry, its byte range checked against dtype and shape."""
    where = f"{file}: tensor {show(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        reject(Rule.BAD_HEADER, f"{where} has a malformed header entry. Save the adapter again.", file)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        advice = "Save the adapter in float32, float16 or bfloat16"
        reject(Rule.UNSUPPORTED_DTYPE, f"{where} has dtype {show(dtype)}. {advice}.", file)
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        reject(Rule.BAD_HEADER, f"{where} has a malformed shape or offsets. Save the adapter again.", file)
    if 0 in shape:
        reject(
            Rule.EMPTY_TENSOR, f"{where} has shape {list(shape)[:8]}: it holds nothing. Save the adapter again.", file
        )
    start, stop = offsets
    if stop - start != math.prod(shape) * np.dtype(_DTYPES[dtype][0]).itemsize:
        reject(Rule.BAD_HEADER, f"{where} has offsets that do not fit its shape. Save the adapter again.", file)
    return TensorInfo(file, name, dtype, tuple(shape), base + start, base + stop)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(v) is int and v >= 0 for v in value)


def _check_cover(file: str, tensors: list[TensorInfo], base: int, size: int) -> None:
    """Tensors must follow one another from the header to the end of the file."""
    end = base
    for tensor in sorted(tensors, key=lambda t: t.start):
        if tensor.stop > size:
            advice = "Upload it again"
            reject(Rule.TRUNCATED_FILE, f"{file} ends inside {show(tensor.name)}: it is cut off. {advice}.", file)
        if tensor.start != end:
            reject(Rule.BAD_HEADER, f"{file}: {show(tensor.name)} overlaps another tensor or leaves a gap.", file)
        end = tensor.stop
    if end != size:
        reject(
            Rule.BAD_HEADER, f"{file} has {size - end} bytes that belong to no tensor. Save the adapter again.", file
        )
