"""Broken bytes may only ever be refused by name, or be accepted and then load."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.adapters.load import load_adapter
from slipstream.adapters.patterns import compile_patterns, first_match
from slipstream.adapters.rejection import Rule
from slipstream.adapters.validate import inspect_adapter
from slipstream.errors import AdapterRejected
from slipstream.protocol import BaseModelSpec

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def victim(valid_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(valid_folders / "own", tmp_path_factory.mktemp("fuzz") / "own"))


def check(victim: Path, original: Path, name: str, data: bytes, base: BaseModelSpec) -> None:
    (victim / name).write_bytes(data)
    code = None
    try:
        inspect_adapter(victim, base)
        load_adapter(victim)
    except AdapterRejected as error:
        code = error.code
    finally:
        shutil.copyfile(original / name, victim / name)
    assert code is None or code in set(Rule)


NAMES = st.sampled_from(["adapter_model.safetensors", "turbo_streams.safetensors"])


@FUZZ
@given(name=NAMES, keep=st.floats(0, 1))
def test_truncation(name: str, keep: float, victim: Path, valid_folders: Path, base: BaseModelSpec) -> None:
    data = (valid_folders / "own" / name).read_bytes()
    check(victim, valid_folders / "own", name, data[: int(len(data) * keep)], base)


@FUZZ
@given(name=NAMES, where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_flipped_bits_in_the_header(
    name: str, where: float, flip: int, victim: Path, valid_folders: Path, base: BaseModelSpec
) -> None:
    data = bytearray((valid_folders / "own" / name).read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    data[int(where * (8 + length))] ^= flip
    check(victim, valid_folders / "own", name, bytes(data), base)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(data=st.data(), name=st.sampled_from(["adapter_config.json", "turbo_config.json"]), value=JSON)
def test_any_value_in_any_field(
    data: st.DataObject, name: str, value: object, victim: Path, valid_folders: Path, base: BaseModelSpec
) -> None:
    config = json.loads((valid_folders / "own" / name).read_text())
    config[data.draw(st.sampled_from(sorted(config)))] = value
    check(victim, valid_folders / "own", name, json.dumps(config).encode(), base)


@FUZZ
@given(value=JSON)
def test_any_header_entry(value: object, victim: Path, valid_folders: Path, base: BaseModelSpec) -> None:
    name = "adapter_model.safetensors"
    data = (valid_folders / "own" / name).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[next(k for k in header if k != "__metadata__")] = value
    text = json.dumps(header).encode()
    check(victim, valid_folders / "own", name, struct.pack("<Q", len(text)) + text + data[8 + length :], base)


@settings(max_examples=300, deadline=None)
@given(key=st.text(alphabet=r"aqvproj_.*+?()|[]\{}0123,^$", max_size=24))
def test_no_accepted_pattern_is_slow(key: str) -> None:
    try:
        patterns = compile_patterns({key: 4}, "rank_pattern", "adapter_config.json")
    except AdapterRejected:
        return
    started = time.perf_counter()
    first_match(patterns, "model.layers.10.self_attn." + "a" * 30 + "q_proj", 8)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("key", ["q_proj", r"model\.layers\.\d+\.mlp.*", r"layers\.(0|1|2)\..*(q|v)_proj", "[qv]_proj"])
def test_useful_patterns_match_as_in_peft(key: str) -> None:
    patterns = compile_patterns({key: 4}, "rank_pattern", "adapter_config.json")
    for path in ("model.layers.1.self_attn.q_proj", "model.layers.12.mlp.up_proj", "lm_head", "model.layers.0.xq_proj"):
        assert (first_match(patterns, path, 8) == 4) == bool(re.match(rf"(.*\.)?({key})$", path))
