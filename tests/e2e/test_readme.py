"""The README's own blocks, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.serving import ROOT, Running

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.timeout(1800)]

MARK = "<!-- executed by tests/e2e/test_readme.py -->"


def blocks() -> list[tuple[str, str]]:
    """(language, code) of every block that the README says is executed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(re.escape(MARK) + r"\n```(\w+)\n(.*?)```", text, re.DOTALL)


def checkout(folder: Path) -> None:
    """A folder that looks like an installed clone: `.venv/bin/…` and the examples."""
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    run = {"python": '"$@"', "slipstream": '-c "from deployments.main import main; main()" "$@"'}
    for name, arguments in run.items():
        script = tools / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}\n')
        script.chmod(0o755)
    (folder / "examples").symlink_to(ROOT / "examples")


def test_the_quick_start_works_word_for_word(server: Running, tmp_path: Path) -> None:
    checkout(tmp_path)
    found = blocks()
    assert [language for language, _ in found] == ["bash", "bash", "python", "bash", "python", "python"]
    environment = os.environ | {
        "SLIPSTREAM_URL": server.url,
        "SLIPSTREAM_API_KEY": server.key,
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
        "NO_PROXY": "127.0.0.1",
    }
    printed = []
    for language, code in found:
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "Paris" in printed[0]
    assert "first" in printed[1]
    assert "first@1" in printed[2]
    assert "tokens per step" in printed[2]
    assert "Published dates@1" in printed[3]
    assert "16 rows of held-out.jsonl" in printed[3]
    assert "succeeded dates-job@1" in printed[4]
    assert "dates-sdk@1" in printed[5]
