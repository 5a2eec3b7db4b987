"""The embedded Redis: it keeps data, hides behind a password, stops with us and cleans up after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from support.processes import alive, eventually

from deployments.embedded_redis import EmbeddedRedis, embedded_redis

pytestmark = pytest.mark.redis

_PARENT = """
import sys, time
from pathlib import Path
from deployments.embedded_redis import embedded_redis
with embedded_redis(Path(sys.argv[1]), Path(sys.argv[2])) as server:
    print(server.pid, server.port, flush=True)
    time.sleep(60)
"""


def connect(server: EmbeddedRedis) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


def wait_gone(pid: int) -> bool:
    return eventually(lambda: not alive(pid), 10.0)


def test_data_and_password_outlive_a_restart(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "redis", tmp_path / "redis.log") as server, connect(server) as client:
        client.set("adapter", "sql")
        first = server
    assert not alive(first.pid)
    with embedded_redis(tmp_path / "redis", tmp_path / "redis.log") as server, connect(server) as client:
        assert client.get("adapter") == "sql"
        assert server.password == first.password


def test_needs_the_password_which_only_its_owner_can_read(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "redis", tmp_path / "redis.log") as server:
        stranger = redis.Redis(host="127.0.0.1", port=server.port)
        with stranger, pytest.raises(redis.exceptions.AuthenticationError):
            stranger.ping()
        assert (tmp_path / "redis" / "password").stat().st_mode & 0o077 == 0
        assert server.password not in Path(f"/proc/{server.pid}/cmdline").read_text()


def test_listens_on_loopback_only(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "redis", tmp_path / "redis.log") as server, connect(server) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_two_folders_are_two_servers(tmp_path: Path) -> None:
    with (
        embedded_redis(tmp_path / "a", tmp_path / "a.log") as a,
        embedded_redis(tmp_path / "b", tmp_path / "b.log") as b,
        connect(b) as client,
    ):
        assert a.port != b.port
        assert client.dbsize() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_dies_with_a_killed_parent_and_loses_nothing(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path / "redis"), str(tmp_path / "redis.log")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root / 'platform'}{os.pathsep}{root}"},
    ) as parent:
        assert parent.stdout is not None
        pid, port = (int(word) for word in parent.stdout.readline().split())
        password = (tmp_path / "redis" / "password").read_text().strip()
        with connect(EmbeddedRedis(pid, port, password)) as client:
            client.set("kept", "yes")
        parent.send_signal(signal.SIGKILL)
    assert wait_gone(pid)
    with embedded_redis(tmp_path / "redis", tmp_path / "redis.log") as server, connect(server) as client:
        assert client.get("kept") == "yes"


def test_an_orphan_of_the_same_folder_is_stopped_first(tmp_path: Path) -> None:
    # As if its parent had crashed on a system without the parent-death signal: the state file is still there.
    with (
        embedded_redis(tmp_path / "redis", tmp_path / "redis.log") as orphan,
        embedded_redis(tmp_path / "redis", tmp_path / "redis.log") as server,
    ):
        assert wait_gone(orphan.pid)
        assert server.pid != orphan.pid


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 1, "port": "x"}', pytest.param('{"pid": OURS, "port": 1}', id="somebody else's")]
)
def test_a_damaged_or_foreign_state_file_harms_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "server.json").write_text(text.replace("OURS", str(os.getpid())))
    with embedded_redis(tmp_path / "redis", tmp_path / "redis.log") as server:
        assert server.pid != os.getpid()
