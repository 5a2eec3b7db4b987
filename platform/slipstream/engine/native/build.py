"""Builds `kernels.cpp` once for this processor and keeps the result in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-fopenmp", "-fPIC",
    "-shared",
)  # fmt: skip
COMPILERS = ("g++", "c++")  # the first that is found
BUILD_TIMEOUT_S = 120
_REAL, _INT, _PTR = ctypes.c_float, ctypes.c_int64, ctypes.c_void_p
SIGNATURES: dict[str, list[Any]] = {
    "add_norm": [_PTR] * 4 + [_REAL] + [_INT] * 2,
    "silu_mul": [_PTR] * 2 + [_INT] * 2,
    "rotate_store": [_PTR] * 5 + [_REAL] + [_PTR] * 3 + [_INT] * 5,
    "attend": [_PTR] * 7 + [_INT] * 11 + [_REAL] * 2,
    "best": [_PTR] * 4 + [_INT] * 3,
    "scores": [_PTR, _INT, _PTR, _INT, _PTR, _PTR, _INT],
    "draw": [_PTR] * 4 + [_INT] * 3 + [_PTR, _INT],
    "streams": [_PTR, _INT, _INT, _PTR, _INT],
    "lora": [_PTR, _INT, _PTR, _INT, _INT, _PTR, _INT, _INT, _PTR, _INT, _PTR, _INT, _PTR],
}


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None where that cannot be done (said once, in the log)."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        log.warning("No C++ compiler (g++) found: the engine runs on torch's own operations, which is slower.")
        return None
    try:
        found = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("The CPU kernels could not be built (%s): the engine runs on torch's own operations.", said.strip())
        return None
    for name, arguments in SIGNATURES.items():
        for suffix in ("f32", "bf16"):
            function = getattr(found, f"slipstream_{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    found.slipstream_product_bf16.argtypes = [_PTR] * 2 + [_INT] + [_PTR] * 2 + [_INT] * 3
    found.slipstream_product_bf16.restype = None
    found.slipstream_product_bytes.argtypes = [_PTR] * 2 + [_INT] + [_PTR] * 3 + [_INT] * 3
    found.slipstream_product_bytes.restype = None
    found.slipstream_lora_pairs.argtypes = SIGNATURES["lora"]
    found.slipstream_lora_pairs.restype = None
    found.slipstream_put_modules.argtypes, found.slipstream_put_modules.restype = [_PTR] + [_INT] * 3, None
    found.slipstream_decode_bf16.argtypes, found.slipstream_decode_bf16.restype = [_PTR] * 2, None
    found.slipstream_best_ids_bf16.argtypes = [_PTR] * 4 + [_INT, _PTR]
    found.slipstream_best_ids_bf16.restype = None
    found.slipstream_filter_bytes.argtypes, found.slipstream_filter_bytes.restype = [_PTR, _INT], _INT
    return found


def _built(compiler: str) -> Path:
    """Path of the library for this source, compiler and processor."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S)
    what = [SOURCE.read_text(), said.stdout, *FLAGS, _processor()]
    name = hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]
    for folder in (user_cache_path("slipstream"), Path(tempfile.gettempdir()) / f"slipstream-kernels-{os.getuid()}"):
        target = folder / f"kernels-{name}.so"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():  # someone else's folder in /tmp: what lies there is not run
                continue
            if target.exists():
                return target
            handle, scratch = tempfile.mkstemp(suffix=".so", dir=folder)
        except OSError:  # a read-only home: the next one
            continue
        os.close(handle)
        try:
            command = [compiler, *FLAGS, "-o", scratch, str(SOURCE)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S)
            Path(scratch).replace(target)  # at once, also when several replicas start together
        finally:
            Path(scratch).unlink(missing_ok=True)
        return target
    raise OSError("no folder to build them in can be written")


def _processor() -> str:
    """What tells processors apart, for homes that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{torch.backends.cpu.get_cpu_capability()} {flags}"
