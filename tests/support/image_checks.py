"""What must hold of a built image's environment, wherever its packages came from."""

from __future__ import annotations

import json
import shutil
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.image import ROOT, Build
from support.lock import installed_closure

PACKAGES = {"slipstream": "platform/slipstream", "adapter_registry": "adapter_registry", "deployments": "deployments"}
_IMPORT_ALL = """
import importlib, json, pkgutil
found = {}
for name in ("slipstream", "adapter_registry", "deployments"):
    package = importlib.import_module(name)
    found[name] = package.__file__
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        try:
            found[module.name] = importlib.import_module(module.name).__file__
        except ModuleNotFoundError as missing:
            if missing.name != "triton":  # only CUDA builds of torch bring it
                raise
from deployments.demos import demo_folder
from slipstream.engine.native.build import library
print(json.dumps([found, str(demo_folder()), library() is not None]))
"""


def check_wheel_has_every_file(build: Build) -> None:
    """Code, Lua, C++ and the demo adapters, and none of the tests."""
    (wheel,) = build.path("/dist").glob("slipstream-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {name: ROOT / folder for name, folder in PACKAGES.items()}
    sources["deployments/demo_adapters"] = ROOT / "examples" / "adapters"
    wanted = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in sources.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == wanted
    assert {"slipstream/engine/native/kernels.cpp", "adapter_registry/lua/publish.lua"} <= found


def check_everything_works(build: Build, folder: Path) -> None:
    """Every module imports out of the image's environment, and CPU kernels are built; what is written is in the home folder,
    which is all that a container has for itself (the environment belongs to root there)."""
    before = set(build.installed_files())
    done = build.call("python", "-W", "ignore", "-c", _IMPORT_ALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    modules, demos, kernels = json.loads(done.stdout.splitlines()[-1])
    assert len(modules) > 150
    installed = str(build.site_packages())
    assert [name for name, file in modules.items() if not file.startswith(installed)] == []
    assert demos.startswith(installed)
    assert kernels == bool(shutil.which("g++") or shutil.which("c++")), done.stderr
    assert kernels == any(build.path("/var/lib/slipstream/.cache/slipstream").glob("kernels-*.so"))
    assert set(build.installed_files()) == before


def check_commands(build: Build, folder: Path) -> None:
    """What ENTRYPOINT runs, with the image's own settings."""
    helped = build.call("slipstream", "serve", "--help", cwd=folder, COLUMNS="200")
    assert helped.returncode == 0, helped.stderr
    assert "Serve on this machine" in helped.stdout
    written = build.call("slipstream", "config", "--serve", cwd=folder)
    assert written.returncode == 0, written.stderr
    assert yaml.safe_load(written.stdout)["http_options"]["host"] == "0.0.0.0", "else nobody outside reaches it"


def check_bill_of_materials(build: Build) -> None:
    """CycloneDX (the tool has checked it against the schema), with everything that the project asks for."""
    page = json.loads(build.path("/usr/share/doc/slipstream/sbom.cdx.json").read_text(encoding="utf-8"))
    assert (page["bomFormat"], page["specVersion"]) == ("CycloneDX", "1.6")
    assert "serialNumber" not in page, "reproducible: the same environment, the same file"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    root = page["metadata"]["component"]
    assert (root["name"], root["version"], root["type"]) == ("slipstream", project["version"], "application")
    found: dict[str, Any] = {canonicalize_name(part["name"]): part for part in page["components"]}
    wanted = installed_closure(project["dependencies"])
    assert {name: found[name]["version"].partition("+")[0] for name in wanted} == wanted
    edges = {entry["ref"]: entry.get("dependsOn", []) for entry in page["dependencies"]}
    direct = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert {found[name]["bom-ref"] for name in direct} <= set(edges[root["bom-ref"]])
