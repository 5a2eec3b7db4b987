"""The Dockerfile as hadolint and we read it; its steps are run in tests/integration/test_image.py."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from support.image import (
    DOCKERFILE,
    ROOT,
    ancestry,
    context_files,
    environment_of,
    health_command,
    last,
    read_dockerfile,
)
from support.lock import installed_closure

PUBLISHED = ("cpu", "cuda")
CONFIG = ROOT / ".hadolint.yaml"


def findings(dockerfile: str) -> list[str]:
    """Rules that hadolint says are broken."""
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    done = subprocess.run(
        [hadolint, "--config", CONFIG, "--format", "json", "-"], input=dockerfile, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found else 0), done.stderr
    return [f"{entry['code']} line {entry['line']}: {entry['message']}" for entry in found]


def test_hadolint_finds_nothing() -> None:
    assert findings(DOCKERFILE.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("USER 1000:1000", "USER root", "DL3002"),
        ("--no-install-recommends ", "", "DL3015"),
        ("--no-cache-dir ", "", "DL3042"),
        ("WORKDIR /build", "WORKDIR build", "DL3000"),
        ("image.title", "image.titel", "DL3050"),
        ("--wheel-dir /dist .", "--wheel-dir $DIST .", "SC2086"),
    ],
)
def test_hadolint_finds_mistakes(old: str, new: str, rule: str) -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert old in text
    assert any(found.startswith(rule) for found in findings(text.replace(old, new)))


def test_every_rule_that_is_left_out_says_why() -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert config["failure-threshold"] == "style"
    for rule in config["ignored"]:
        (line,) = [line for line in CONFIG.read_text(encoding="utf-8").splitlines() if rule in line]
        assert len(line.partition("#")[2].split()) > 5
    assert config["disable-ignore-pragma"] is True, "none is left out quietly in the file"


def test_only_what_the_wheel_is_made_of_goes_into_a_build() -> None:
    found = context_files()
    tops = {path.split("/")[0] for path in found} - {"Dockerfile", ".dockerignore"}  # Docker always takes these two
    sources = {"platform", "adapter_registry", "deployments", "examples"}
    assert tops == sources | {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert all(path.startswith("examples/adapters/") for path in found if path.startswith("examples/"))
    assert not [path for path in found if "__pycache__" in path or path.endswith((".pyc", ".env", ".key", ".pem"))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_image_runs_as_nobody_special_and_serves(name: str) -> None:
    stages = read_dockerfile()
    assert last(stages, name, "USER") == "1000:1000", "a number: runAsNonRoot cannot check a name"
    assert json.loads(last(stages, name, "ENTRYPOINT")) == ["tini", "--", "slipstream"]
    assert json.loads(last(stages, name, "CMD")) == ["serve"]
    environment = environment_of(stages, name)
    assert environment["HOME"] == environment["SLIPSTREAM_HOME"] == last(stages, name, "WORKDIR")
    assert environment["SLIPSTREAM_HOST"] == "0.0.0.0"
    assert "/healthz" in health_command(stages, name)[-1]
    labels = stages[name].all("LABEL")[-1]
    schema = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["label-schema"]
    assert set(re.findall(r"(org\.opencontainers\.image\.\w+)=", labels)) == set(schema)


def test_what_kuberay_calls_is_in_the_image() -> None:
    """It starts Ray with bash, which Debian has, and its readiness probe of a worker is `wget … | grep success`."""
    for name in PUBLISHED:
        (install,) = [
            run for stage in ancestry(read_dockerfile(), name) for run in stage.all("RUN") if "apt-get" in run
        ]
        assert {"wget", "tini", "g++"} <= set(install.split())
    assert any(point.name == "ray" for point in metadata.distribution("ray").entry_points)


def test_both_targets_differ_in_torch_alone() -> None:
    stages = read_dockerfile()

    def normal(name: str) -> list[str]:
        steps = [f"{step.instruction} {step.value}" for step in stages[name].steps]
        text = "\n".join(step for step in steps if "NVIDIA_" not in step and "import torch" not in step)
        return text.replace("cuda", "cpu").replace("(CUDA)", "(CPU)").splitlines()

    assert normal("cuda") == normal("cpu")
    installs = [stages[f"packages-{name}"].all("RUN")[0].partition("python -c")[0] for name in PUBLISHED]
    assert installs[0] == installs[1]


def test_everything_that_pip_installs_in_a_build_is_pinned() -> None:
    pins = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = installed_closure([*project["dependencies"], "hatchling", "cyclonedx-bom"])
    assert set(needed) <= set(pins), "make lock"
    for stage in read_dockerfile().values():
        for run in stage.all("RUN"):
            for command in re.findall(r"pip install [^&]*", run):
                assert "--constraint constraints.txt" in command or "--no-deps --no-index" in command


def test_each_pin_satisfies_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for text in project["dependencies"]:
        requirement = Requirement(text)
        (version,) = [pin.partition("==")[2] for pin in pins if pin.startswith(f"{requirement.name.lower()}==")]
        assert requirement.specifier.contains(version), text
