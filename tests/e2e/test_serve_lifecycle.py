"""`slipstream serve` as a person runs it: a process of its own, a data folder of its own, real everything."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.processes import alive, command, eventually, free_port
from support.serving import Running, serving, slipstream, stop
from support.shared import shared_path

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.timeout(600)]

_START_S = 60.0  # the promise for every start but the first


def assert_nothing_left(running: Running, home: Path) -> None:
    assert len(running.children) > 5
    assert not [pid for pid in running.children if alive(pid)]
    assert not running.scratch.exists()
    assert not (home / "scratch").exists()
    assert not (home / "redis" / "server.json").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/healthz", trust_env=False)


def complete(running: Running, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 64, "temperature": 0}
    with running.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


@pytest.fixture
def home() -> Iterator[Path]:
    """Not pytest's own: its paths are long, and a person's home is where sockets and locks must work."""
    with tempfile.TemporaryDirectory(prefix="slip-e2e-") as folder:
        yield Path(folder) / "home"


def test_three_lives_of_one_data_folder(home: Path) -> None:
    adapter, port = shared_path("adapters", "snips-turbo"), free_port()
    prompt = (
        "Extract the intent and the slots of the command as a JSON object.\nCommand: Rate this book 3 stars.\nJSON:"
    )

    with serving(home, port, SLIPSTREAM_DISABLE="") as first:  # as a user has it
        key = first.key
        answered = subprocess.run(
            ["bash", "-c", f"{first.curl} -s"], capture_output=True, text=True, timeout=60, check=True
        )
        assert "Paris" in answered.stdout
        pushed = slipstream(
            home,
            port,
            "adapters",
            "push",
            str(adapter),
            "--name",
            "snips",
            SLIPSTREAM_URL=first.url,
            SLIPSTREAM_API_KEY=key,
        )
        assert pushed.returncode == 0, pushed.stderr
        answer = complete(first, "snips", prompt)
        assert '"intent"' in answer
        refused = slipstream(home, free_port(), "serve")
        assert refused.returncode == 1
        assert "already running" in refused.stderr
        assert stop(first, signal.SIGINT) == 0
    assert_nothing_left(first, home)

    with serving(home, port) as second:
        assert second.started_in_s < _START_S
        assert second.key == key
        assert complete(second, "snips", prompt) == answer
        # Ray's two agents try for a minute to report the crash to a head that is gone, and then leave.
        agents = {pid for pid in second.children if re.match(r"ray::(RuntimeEnv|Dashboard)Agent", command(pid))}
        second.process.kill()  # a crash: no chance to clean up
        second.process.wait()
    assert len(agents) == 2
    assert eventually(lambda: not [pid for pid in second.children - agents if alive(pid)])

    with serving(home, port) as third:
        assert not second.scratch.exists()
        assert third.key == key
        assert complete(third, "snips", prompt) == answer
        assert stop(third, signal.SIGTERM) == 0
    assert_nothing_left(third, home)
    assert not {path.name for path in home.iterdir()} & {"scratch"}


def test_a_taken_port_is_refused_before_anything_starts(home: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = slipstream(home, other.getsockname()[1], "serve")
    assert done.returncode == 1
    assert re.fullmatch(r"slipstream serve: Port \d+ on 127\.0\.0\.1 cannot be used .*\n", done.stderr)
    assert not home.exists()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SLIPSTREAM_DTYPE", "int3", "SLIPSTREAM_DTYPE"),
        ("SLIPSTREAM_BASE_MODEL", "/there/is/none", "neither a folder"),
        ("SLIPSTREAM_KV_CACHE_BYTES", str(1 << 20), "kv_cache_bytes"),
        ("SLIPSTREAM_REDIS_URL", "redis://127.0.0.1:1/0", "SLIPSTREAM_REDIS_URL"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_leaves_nothing(home: Path, variable: str, value: str, said: str) -> None:
    before = set(Path(tempfile.gettempdir()).glob("slipstream-*"))
    done = slipstream(home, free_port(), "serve", **{variable: value})
    assert done.returncode == 1, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert set(Path(tempfile.gettempdir()).glob("slipstream-*")) <= before
