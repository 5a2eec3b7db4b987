"""`slipstream serve` with demo adapters: the printed curl line, as it stands there, answers faster than a token a step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import free_port
from support.serving import ROOT, Running, serving, stop
from support.shared import shared_path

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.timeout(600)]

PROMPT = "Extract the intent and the slots of the command as a JSON object.\nCommand: Rate this book 3 stars.\nJSON:"


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slip-e2e-") as folder:
        yield Path(folder) / "home"


@pytest.fixture
def checkout(tmp_path: Path) -> str:
    """PYTHONPATH of a checkout whose only demo is the shared snips adapter."""
    (tmp_path / "deployments").symlink_to(ROOT / "deployments")
    demos = tmp_path / "examples" / "adapters"
    # Copied: the shared one may be read-only, and it has no card of its own.
    shutil.copytree(shared_path("adapters", "snips-turbo"), demos / "snips", copy_function=shutil.copyfile)
    (demos / "snips").chmod(0o755)
    (demos / "snips" / "training_card.md").write_text("# Snips")
    row = {"name": "snips", "description": "a command's intent and slots as JSON", "prompt": PROMPT}
    (demos / "demos.json").write_text(json.dumps([row]))
    return os.pathsep.join(map(str, (tmp_path, ROOT / "platform", ROOT)))


def run_curl(running: Running) -> dict[str, Any]:
    done = subprocess.run(["bash", "-c", f"{running.curl} -s"], capture_output=True, text=True, timeout=60, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def tokens_per_step(answer: dict[str, Any]) -> float:
    usage = answer["usage"]
    return float(usage["completion_tokens"] / usage["decode_steps"])


def test_the_first_curl_shows_a_turbo_lora(home: Path, checkout: str) -> None:
    port, settings = free_port(), {"PYTHONPATH": checkout, "SLIPSTREAM_DEMO_ADAPTERS": "true"}
    with serving(home, port, **settings) as first:
        assert "Try a Turbo LoRA, snips@1" in first.output
        answer = run_curl(first)
        assert answer["model"] == "snips@1"
        assert '"intent"' in answer["choices"][0]["text"]
        assert tokens_per_step(answer) > 1.3
        with first.client() as client:
            card = client.get("/v1/adapters/snips/versions/1/files/training_card.md")
            assert card.text == "# Snips"
            policy = {"enabled": False, "reason": "of a test"}
            assert client.put("/v1/adapters/snips/versions/1/speculation", json=policy).status_code == 200
        slow = run_curl(first)  # the same line: the policy is all that changed
        assert slow["choices"][0]["text"] == answer["choices"][0]["text"]
        assert tokens_per_step(slow) == 1
        assert stop(first, signal.SIGINT) == 0

    with serving(home, port, **settings) as second:
        assert run_curl(second)["model"] == "snips@1"
        with second.client() as client:
            [version] = client.get("/v1/adapters/snips").json()["versions"]
        assert version["speculation"] == policy  # a start does not take back what somebody decided
        assert stop(second, signal.SIGINT) == 0


def test_our_own_demos_pay(home: Path) -> None:
    with serving(home, free_port(), SLIPSTREAM_DEMO_ADAPTERS="true") as running:
        assert "Try a Turbo LoRA" in running.output
        assert "was not published" not in running.output
        assert tokens_per_step(run_curl(running)) > 1.5
        assert stop(running, signal.SIGINT) == 0
