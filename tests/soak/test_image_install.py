"""All of the `cpu` target's steps with packages from the index, as a build does them; and a start of what came of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest
from support.image import Build, health_command
from support.image_checks import (
    check_bill_of_materials,
    check_commands,
    check_everything_works,
    check_wheel_has_every_file,
)
from support.processes import eventually, free_port
from support.real_model import smollm2_path

pytestmark = [pytest.mark.soak, pytest.mark.model, pytest.mark.redis, pytest.mark.ray, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Every stage, in the order that a build takes them."""
    built = Build(tmp_path_factory.mktemp("image"))
    for stage in ("build", "packages-cpu", "wheel", "sbom", "cpu"):
        built.run(stage)
    return built


def test_a_fresh_install_is_whole(build: Build, tmp_path: Path) -> None:
    check_wheel_has_every_file(build)
    check_everything_works(build, tmp_path)
    check_commands(build, tmp_path)
    check_bill_of_materials(build)
    for command in ("start", "kuberay-autoscaler"):  # what KubeRay runs in the pods
        assert build.call("ray", command, "--help", cwd=tmp_path).returncode == 0


def test_it_serves_and_becomes_healthy(build: Build, tmp_path: Path) -> None:
    """ENTRYPOINT and CMD without tini; on loopback, which is not what the image itself says."""
    port = str(free_port())
    own = {"PORT": port, "SLIPSTREAM_HOST": "127.0.0.1", "SLIPSTREAM_BASE_MODEL": str(smollm2_path())}
    environment = build.environment("cpu") | own
    command = [str(build.path("/opt/slipstream/bin/slipstream")), "serve"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as process:
        try:
            words = health_command(build.stages, "cpu")

            def healthy_or_gone() -> bool:
                return process.poll() is not None or build.call(*words, cwd=tmp_path, PORT=port).returncode == 0

            assert eventually(healthy_or_gone, 300)
            assert process.poll() is None
            ready = f"http://127.0.0.1:{port}/readyz"
            assert eventually(lambda: httpx.get(ready, trust_env=False, timeout=10).is_success, 120)
            process.terminate()  # as `docker stop`: to the first process alone
            assert process.wait(60) == 0
        finally:
            process.kill()
