"""`slipstream serve` as a person runs it: a process of its own, a data folder of its own, real everything."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from support.processes import descendants
from support.real_model import smollm2_path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_COMMAND = [sys.executable, "-c", "from deployments.main import main; main()"]


@dataclass
class Running:
    """A started server and what it printed."""

    process: subprocess.Popen[str]
    output: str
    scratch: Path
    children: set[int]
    started_in_s: float
    home: Path

    @property
    def admin_key(self) -> str:
        """The one that was made on the first start."""
        return (self.home / "admin.key").read_text(encoding="utf-8").strip()

    @property
    def url(self) -> str:
        return self._printed(r"ready at (http://\S+)")

    @property
    def key(self) -> str:
        return self._printed(r"Key of the tenant 'demo': (\S+)")

    @property
    def curl(self) -> str:
        return self._printed(r"(curl .*\\\n.*)")

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def _printed(self, pattern: str) -> str:
        found = re.search(pattern, self.output)
        assert found, self.output
        return found.group(1)


def environment(home: Path, port: int, **more: str) -> dict[str, str]:
    """Of a user who has set nothing but these."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLIPSTREAM_", "RAY_", "PYTEST_"))
    }
    return kept | {
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
        "SLIPSTREAM_HOME": str(home),
        "SLIPSTREAM_BASE_MODEL": str(smollm2_path()),
        "SLIPSTREAM_KV_CACHE_BYTES": str(400 << 20),
        "SLIPSTREAM_DEMO_ADAPTERS": "false",  # tests publish what they need
        "SLIPSTREAM_DISABLE": '["adaptive-drafts"]',  # a test's drafts must not hang on how busy the machine is
        "PORT": str(port),
        **more,
    }


@contextmanager
def serving(home: Path, port: int, **more: str) -> Iterator[Running]:
    """Start a server and wait until it says that it is ready; killed at the end if it still runs."""
    began = time.monotonic()
    with subprocess.Popen(
        [*_COMMAND, "serve"],
        cwd=home.parent,
        env=environment(home, port, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a terminal's process group: Ctrl-C reaches everything in it
    ) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "Ctrl-C stops it" in line:
                    break
            output = "".join(lines)
            assert "ready at" in output, output
            took_s = time.monotonic() - began
            scratch = Path((home / "scratch").read_text())
            yield Running(process, output, scratch, descendants(process.pid), took_s, home)
        finally:
            if process.poll() is None:
                process.kill()


def stop(running: Running, number: signal.Signals) -> int:
    """As a terminal does it: the signal goes to the whole process group."""
    os.killpg(running.process.pid, number)
    return running.process.wait(60)


def slipstream(home: Path, port: int, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a `slipstream` command to its end."""
    return subprocess.run(
        [*_COMMAND, *words],
        env=environment(home, port, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
