"""The house's rules: who may import whom, who may read the environment, and that `platform` stays Python's."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"slipstream": "platform/slipstream", "adapter_registry": "adapter_registry", "deployments": "deployments"}
REGISTRY_SEAM = ("records", "store", "jobs", "tenants", "limits", "errors", "keys", "imports", "webhooks", "changes")
ENVIRONMENT_READERS = {"slipstream.config", "slipstream.process_env"}


@dataclass(frozen=True)
class Rule:
    """Modules under `who` import nothing under `never`, save what is under `save`."""

    who: str
    never: tuple[str, ...]
    save: tuple[str, ...] = ()


RULES = (
    Rule("adapter_registry", ("slipstream", "deployments", "ray", "torch", "fastapi", "transformers")),
    Rule("slipstream", ("deployments", "ray")),
    Rule("slipstream", ("adapter_registry",), save=tuple(f"adapter_registry.{name}" for name in REGISTRY_SEAM)),
    Rule("slipstream.api", ("ray", "redis", "torch", "transformers")),
    Rule("slipstream.client", ("ray", "redis", "torch", "transformers", "fastapi")),
    Rule(
        "slipstream.engine",
        (
            "ray",
            "redis",
            "fastapi",
            "prometheus_client",
            "opentelemetry",
            "slipstream.api",
            "slipstream.metrics",
            "slipstream.telemetry",
        ),
    ),
    Rule("slipstream.metrics", ("ray", "redis", "torch", "transformers", "fastapi", "slipstream.api")),
    Rule("slipstream.client", ("slipstream.telemetry", "opentelemetry")),
    Rule("slipstream.telemetry", ("ray", "redis", "fastapi", "torch", "transformers", "slipstream.api")),
    Rule("slipstream.adapters", ("ray", "redis", "fastapi", "slipstream.api", "slipstream.engine")),
    *(
        Rule(f"slipstream.engine.{name}", ("torch", "transformers", "numpy"))
        for name in (
            "scheduler",
            "blocks",
            "prefixes",
            "leases",
            "residency",
            "sequence",
            "plan",
            "timeline",
            "waiting",
            "observer",
        )
    ),
    Rule("slipstream.protocol", ("torch", "ray", "redis", "fastapi", "pydantic")),
    Rule("slipstream.config", ("torch", "ray", "redis", "fastapi")),
)


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    name: str
    tree: ast.Module

    def imports(self) -> Iterator[str]:
        """Every module this one imports, wherever in the file, with `from a import b` as `a.b`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = self.name.split(".")[: -node.level]
                    base = ".".join([*package, *([base] if base else [])])
                yield from (f"{base}.{alias.name}" for alias in node.names)

    def environment_reads(self) -> Iterator[int]:
        """Lines that touch `os.environ`, `os.getenv` or their kin."""
        names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
        for node in ast.walk(self.tree):
            through_os = (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "os"
                and node.attr in names
            )
            by_name = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and any(alias.name in names for alias in node.names)
            )
            if through_os or by_name:
                assert isinstance(node, ast.Attribute | ast.ImportFrom)
                yield node.lineno


def modules(root: Path, sources: Mapping[str, str]) -> list[Module]:
    found = []
    for package, folder in sources.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found.append(Module(name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def broken_imports(found: list[Module]) -> list[str]:
    return sorted(
        {
            f"{module.name} imports {imported}"
            for rule in RULES
            for module in found
            if under(module.name, rule.who)
            for imported in module.imports()
            if any(under(imported, never) for never in rule.never)
            and not any(under(imported, save) for save in rule.save)
        }
    )


def environment_reads(found: list[Module]) -> list[str]:
    return [
        f"{module.name}:{line}"
        for module in found
        if module.name not in ENVIRONMENT_READERS
        for line in module.environment_reads()
    ]


def test_the_folder_platform_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert Path(done.stdout.strip()).parent == Path(sysconfig.get_path("stdlib"))


def test_imports_run_one_way() -> None:
    found = modules(ROOT, SOURCES)
    assert len(found) > 20
    assert broken_imports(found) == []


def test_only_the_settings_read_the_environment() -> None:
    assert environment_reads(modules(ROOT, SOURCES)) == []


def test_k8s_holds_no_python() -> None:
    assert not list((ROOT / "k8s").rglob("*.py"))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("adapter_registry/x.py", "from ray import serve"),
        ("adapter_registry/x.py", "import slipstream.errors"),
        ("slipstream/x.py", "import ray"),
        ("slipstream/x.py", "def f():\n    from adapter_registry.redis_store import RedisStore"),
        ("slipstream/x.py", "from adapter_registry import redis_store"),
        ("slipstream/api/x.py", "import torch.nn"),
        ("slipstream/api/x.py", "from redis import asyncio"),
        ("slipstream/engine/x.py", "from fastapi import FastAPI"),
        ("slipstream/engine/scheduler.py", "import torch"),
        ("slipstream/engine/x.py", "import prometheus_client"),
        ("slipstream/engine/x.py", "from opentelemetry import trace"),
        ("slipstream/engine/x.py", "from ..api import app"),
    ],
)
def test_a_bad_import_is_found(tmp_path: Path, path: str, code: str) -> None:
    assert broken_imports(_tree(tmp_path, path, code))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("deployments/x.py", "import ray, adapter_registry.redis_store, slipstream.api"),
        ("slipstream/x.py", "from adapter_registry.records import FileEntry\nfrom adapter_registry.store import Store"),
        ("slipstream/engine/runner.py", "import torch"),
        ("slipstream/x.py", "import raypath"),
    ],
)
def test_a_good_import_passes(tmp_path: Path, path: str, code: str) -> None:
    assert not broken_imports(_tree(tmp_path, path, code))


@pytest.mark.parametrize(
    "code", ["import os\nos.environ['A']", "import os\nx = os.getenv('A')", "from os import environ"]
)
def test_a_read_of_the_environment_is_found(tmp_path: Path, code: str) -> None:
    assert environment_reads(_tree(tmp_path, "deployments/x.py", code))


def _tree(root: Path, path: str, code: str) -> list[Module]:
    target = root / path
    target.parent.mkdir(parents=True)
    target.write_text(code)
    return modules(root, {name: name for name in SOURCES})
