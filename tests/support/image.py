"""The Dockerfile's own steps in a clean folder, without a container engine: what they install can be run and looked at.

Absolute paths of the image become paths under that folder; all stages share it, so they use different paths. What needs root
and Debian (`apt-get`, `useradd`) is left out.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
_OF_THE_IMAGE = re.compile(r"(?<![\w/.$}])/(?=(?:opt|build|dist|var/lib|usr/share)\b)")
_MOUNT = re.compile(r"--mount=\S+\s+")
_NEEDS_DEBIAN = ("apt-get", "useradd")


@dataclass(frozen=True)
class Step:
    """One instruction: `RUN` and what it says, comments and line breaks gone."""

    instruction: str
    value: str


@dataclass(frozen=True)
class Stage:
    """A stage and what it stands on; `base` is an image's name for the first."""

    name: str
    base: str
    steps: tuple[Step, ...]

    def all(self, instruction: str) -> list[str]:
        """Values of these instructions."""
        return [step.value for step in self.steps if step.instruction == instruction]


def read_dockerfile(path: Path = DOCKERFILE) -> dict[str, Stage]:
    """Its stages by name, in order. What stands before the first is dropped."""
    with path.open("rb") as stream:
        structure = DockerfileParser(fileobj=stream).structure
    stages: dict[str, Stage] = {}
    name = base = ""
    steps: list[Step] = []
    for entry in [*structure, {"instruction": "FROM", "value": "scratch AS end"}]:
        if entry["instruction"] != "FROM":
            steps.append(Step(entry["instruction"], entry["value"]))
            continue
        if name:
            stages[name] = Stage(name, base, tuple(s for s in steps if s.instruction != "COMMENT"))
        base, _, name = entry["value"].split()
        steps = []
    return stages


def ancestry(stages: Mapping[str, Stage], name: str) -> list[Stage]:
    """The stage and all under it, the lowest first."""
    stage = stages[name]
    return [*(ancestry(stages, stage.base) if stage.base in stages else ()), stage]


def environment_of(stages: Mapping[str, Stage], name: str) -> dict[str, str]:
    """`ENV` of a stage and of those under it, as written."""
    found: dict[str, str] = {}
    for stage in ancestry(stages, name):
        for value in stage.all("ENV"):
            found |= dict(pair.split("=", 1) for pair in shlex.split(value))
    return found


def last(stages: Mapping[str, Stage], name: str, instruction: str) -> str:
    """What holds in a stage for an instruction of which the last one counts."""
    values = [value for stage in ancestry(stages, name) for value in stage.all(instruction)]
    assert values, f"{name} has no {instruction}"
    return values[-1]


def health_command(stages: Mapping[str, Stage], name: str) -> list[str]:
    """Of `HEALTHCHECK … CMD [...]`."""
    words: list[str] = json.loads(last(stages, name, "HEALTHCHECK").partition("CMD ")[2])
    return words


def context_files(root: Path = ROOT) -> list[str]:
    """What .dockerignore lets into a build, as Docker itself reads it."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    found = exclude_paths(str(root), patterns)
    return sorted(path for path in found if (root / path).is_file())


@dataclass
class Build:
    """What was built in `root`."""

    root: Path
    stages: Mapping[str, Stage] = field(default_factory=read_dockerfile)
    context: Sequence[str] = field(default_factory=context_files)

    def __post_init__(self) -> None:
        bin_ = self.path("/usr/local/bin")
        bin_.mkdir(parents=True)
        (bin_ / "python3").symlink_to(Path(sys.base_prefix) / "bin" / f"python{sysconfig.get_python_version()}")
        self.path("/var/lib/slipstream").mkdir(parents=True)

    def path(self, inside: str) -> Path:
        """Where a path of the image is."""
        return self.root / inside.lstrip("/")

    def run(self, name: str, *, without: str | None = None) -> None:
        """Do a stage's own steps, but for `RUN`s that contain `without`. One that fails fails the test, with what it said."""
        workdir = self._workdir(ancestry(self.stages, name)[:-1])
        for step in self.stages[name].steps:
            if step.instruction == "WORKDIR":
                workdir = self.path(step.value)
                workdir.mkdir(parents=True, exist_ok=True)
            elif step.instruction == "COPY":
                self._copy(step.value.split(), workdir)
            elif step.instruction == "RUN" and (without is None or without not in step.value):
                self._shell(name, _MOUNT.sub("", step.value), workdir)

    def call(self, *words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """A command as in a container of the image, with variables of one's own; its exit status is the caller's."""
        environment = self.environment("cpu") | more
        program = shutil.which(words[0], path=environment["PATH"])
        assert program is not None, words[0]
        return subprocess.run(
            [program, *words[1:]], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    def environment(self, name: str) -> dict[str, str]:
        """This process's, without what would leak our checkout into it, and the stage's."""
        ours = ("SLIPSTREAM_", "RAY_", "PYTEST_", "PYTHON", "VIRTUAL_ENV", "TRITON_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        kept["PATH"] = f"{self.path('/usr/local/bin')}{os.pathsep}{kept['PATH']}"
        for variable, value in environment_of(self.stages, name).items():
            kept[variable] = self._here(value).replace("$PATH", kept["PATH"])
        return kept

    def installed_files(self) -> Iterator[Path]:
        """All that lies in the image's environment."""
        return (path for path in self.path("/opt/slipstream").rglob("*") if not path.is_dir())

    def site_packages(self) -> Path:
        """Where its packages are."""
        (found,) = self.path("/opt/slipstream").glob("lib/python*/site-packages")
        return found

    def _here(self, text: str) -> str:
        return _OF_THE_IMAGE.sub(f"{self.root}/", text)

    def _workdir(self, under: Sequence[Stage]) -> Path:
        return self.path(next((stage.all("WORKDIR")[-1] for stage in reversed(under) if stage.all("WORKDIR")), "/"))

    def _copy(self, words: list[str], workdir: Path) -> None:
        *sources, target = [word for word in words if not word.startswith("--")]
        if any(word.startswith("--from=") for word in words):
            assert all(self.path(source).exists() for source in sources), "a stage that was not run"
            return
        into = workdir / target
        for source in sources:
            copied = [path for path in self.context if path == source or path.startswith(source + "/")]
            assert copied, f"{source} is not in the build's context"
            for path in copied:
                goal = into / path if target == "./" else into / Path(path).relative_to(source)
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, goal)

    def _shell(self, name: str, command: str, workdir: Path) -> None:
        if any(word in command for word in _NEEDS_DEBIAN):
            return
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", self._here(command)], cwd=workdir, env=self.environment(name),
            capture_output=True, text=True, timeout=1800, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
