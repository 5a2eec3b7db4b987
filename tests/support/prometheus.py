"""A real Prometheus (Debian's package) on loopback, in a folder of its own, stopped by its own process id."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.processes import eventually, free_port

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "k8s" / "monitoring" / "rules.yaml"
INTERVAL_S = 0.5

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool (Debian's package prometheus) are not installed",
)


def write_rules(path: Path, interval: str | None = None) -> Path:
    """The groups of the PrometheusRule, as Prometheus itself reads them, evaluated each `interval` if that is given."""
    spec = yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"]
    for group in spec["groups"]:
        group["interval"] = interval or group["interval"]
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


@dataclass
class Prometheus:
    """A running one."""

    port: int
    folder: Path

    def get(self, path: str, **params: str) -> Any:
        """The data of an answer of its HTTP API."""
        answer = httpx.get(f"http://127.0.0.1:{self.port}/api/v1/{path}", params=params, timeout=10, trust_env=False)
        found = answer.json()
        assert found["status"] == "success", (params, found)
        return found["data"]

    def query(self, expression: str) -> Sequence[Mapping[str, Any]]:
        """An instant vector, now."""
        result: Sequence[Mapping[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def value(self, expression: str) -> float:
        """Of the only series."""
        (series,) = self.query(expression)
        return float(series["value"][1])

    def active_targets(self) -> Sequence[Mapping[str, Any]]:
        """What it scrapes."""
        targets: Sequence[Mapping[str, Any]] = self.get("targets", state="active")["activeTargets"]
        return targets

    def rules(self) -> Sequence[Mapping[str, Any]]:
        """All rules as they stand."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def log(self) -> str:
        """What it said."""
        return (self.folder / "prometheus.log").read_text(encoding="utf-8", errors="replace")


@contextmanager
def running_prometheus(*scrapes: Mapping[str, Any], rules: bool = True) -> Iterator[Prometheus]:
    """One that scrapes as told (entries of `scrape_configs`), when it is ready. It finds its targets some seconds later."""
    with tempfile.TemporaryDirectory(prefix="slip-prometheus-") as name:
        folder = Path(name)
        page = {
            "global": {"scrape_interval": f"{int(INTERVAL_S * 1000)}ms"},
            "scrape_configs": list(scrapes),
            "rule_files": [str(write_rules(folder / "rules.yaml", "1s"))] if rules else [],
        }
        config, port = folder / "prometheus.yaml", free_port()
        config.write_text(yaml.safe_dump(page), encoding="utf-8")
        command = [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
        ]  # fmt: skip
        with (folder / "prometheus.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            found = Prometheus(port, folder)
            try:
                assert eventually(lambda: _ready(port) or process.poll() is not None), found.log()
                assert process.poll() is None, found.log()
                yield found
            finally:
                process.terminate()
                process.wait(20)


def _ready(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/-/ready", timeout=2, trust_env=False).is_success
    return False


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
