"""What the Dockerfile's steps install works by itself, away from the checkout; only packages come from this environment.

tests/soak/test_image_install.py lets them come from the index as well, as a real build does.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
from support.api_app import ApiWorld
from support.http_server import serving_app
from support.image import Build, health_command
from support.image_checks import (
    check_bill_of_materials,
    check_commands,
    check_everything_works,
    check_wheel_has_every_file,
)
from support.processes import free_port


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """All stages of the `cpu` target but the one that takes packages from an index."""
    built = Build(tmp_path_factory.mktemp("image"))
    built.path("/opt").mkdir()
    for tools in ("/opt/wheel", "/opt/sbom"):  # environments with hatchling and cyclonedx-bom: ours has both
        built.path(tools).symlink_to(sys.prefix)
    built.run("build")
    built.run("wheel", without="pip install")
    built.run("cpu", without="cyclonedx-py")
    # After pip, which would find this very version installed already, in a checkout.
    (built.site_packages() / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    built.run("cpu", without="pip install")
    return built


def test_the_wheel_has_every_file(build: Build) -> None:
    check_wheel_has_every_file(build)


def test_everything_imports_and_nothing_is_written_into_the_image(build: Build, tmp_path: Path) -> None:
    check_everything_works(build, tmp_path)


def test_the_entrypoint_starts(build: Build, tmp_path: Path) -> None:
    check_commands(build, tmp_path)


def test_the_bill_of_materials_names_what_is_installed(build: Build) -> None:
    check_bill_of_materials(build)


def test_the_health_check_tells_a_server_from_none(build: Build, tmp_path: Path) -> None:
    """As Docker runs it; a proxy that the environment names is not asked about our own address."""
    command = health_command(build.stages, "cpu")
    proxied = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    world = ApiWorld(tmp_path)
    with serving_app(world.app) as url:
        assert build.call(*command, cwd=tmp_path, PORT=url.rpartition(":")[2], **proxied).returncode == 0
    assert build.call(*command, cwd=tmp_path, PORT=str(free_port()), **proxied).returncode != 0
