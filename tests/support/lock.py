"""`make lock`: what `pip install -e .[dev]` brought into this environment, as constraints."""

from __future__ import annotations

import importlib.metadata as metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_HEADER = "# What 'pip install -e .[dev]' brings in, at the versions the test suite passed with. Made by 'make lock'."
_UNPINNED = frozenset({"triton"})  # every CUDA build of torch asks for a version of its own


def installed_closure(requirements: list[str]) -> dict[str, str]:
    """Name -> version of these requirements and all that they need, as installed here."""
    todo = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    found: dict[str, str] = {}
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        package = metadata.distribution(wanted.name)
        found[key[0]] = package.version.partition("+")[0]  # a local build (torch's +cpu) is not what an index has
        for text in package.requires or []:
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *wanted.extras}):
                todo.append(need)
    return found


def main() -> None:
    """Print the file."""
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    print(_HEADER)
    closure = installed_closure([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    print("\n".join(f"{name}=={version}" for name, version in sorted(closure.items()) if name not in _UNPINNED))


if __name__ == "__main__":
    main()
