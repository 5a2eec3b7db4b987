"""The Redis component, run: two users, each with what it needs and no more (the registry's whole contract runs on it too)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import redis
from support.kube_redis import ComponentRedis, running_component
from support.processes import free_port

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def server() -> Iterator[ComponentRedis]:
    with running_component() as found:
        yield found


def test_nobody_without_a_name_gets_in(server: ComponentRedis) -> None:
    for url in (f"redis://127.0.0.1:{server.port}", f"redis://:{server.ray_password}@127.0.0.1:{server.port}"):
        with redis.Redis.from_url(url, protocol=2) as client, pytest.raises(redis.AuthenticationError):
            client.ping()


@pytest.mark.parametrize(
    ("who", "own", "other"), [("url", "slipstream:x", "RAYx@KV"), ("ray_url", "RAYx@KV", "slipstream:x")]
)
def test_each_user_has_its_own_keys(server: ComponentRedis, who: str, own: str, other: str) -> None:
    with redis.Redis.from_url(getattr(server, who), protocol=2) as client:
        client.set(own, "1")
        assert client.get(own) == b"1"
        theirs = f"GET {other}", f"SET {other} 1", f"DEL {other}", f"HGETALL {other}"
        for words in (*theirs, "FLUSHALL", "CONFIG GET dir", "ACL LIST", "KEYS *", "SHUTDOWN"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*words.split())


def test_no_password_lies_in_a_file(server: ComponentRedis) -> None:
    written = "".join(path.read_text(errors="replace") for path in server.folder.rglob("*") if path.is_file())
    assert "user slipstream on #" in written
    assert server.registry_password not in written
    assert server.ray_password not in written


def test_it_writes_to_a_file_and_never_evicts(server: ComponentRedis) -> None:
    with redis.Redis.from_url(server.url, protocol=2) as client:
        client.set("slipstream:kept", "1")
        found = client.info("persistence")
        assert found["aof_enabled"] == 1
        assert client.info("memory")["maxmemory_policy"] == "noeviction"


# Ray's control store alone, twice over the same Redis, and what KubeRay runs when a cluster is deleted.
CONTROL_STORE = """
import os, tempfile
from ray import NodeID
from ray._private.gcs_utils import cleanup_redis_storage
from ray._private.services import start_gcs_server
from ray._raylet import GcsClient
from redis import Redis

found = Redis.from_url(os.environ["URL"], protocol=2)
password, port = os.environ["REDIS_PASSWORD"], found.connection_pool.connection_kwargs["port"]

def with_store(folder, act):
    own = {"node_ip_address": "127.0.0.1", "session_dir": folder, "node_id": NodeID.from_random().hex()}
    store = start_gcs_server(
        f"127.0.0.1:{port}", folder, folder + "/out", folder + "/err", "a-session", "ray", password,
        gcs_server_port=int(os.environ["PORT"]), metrics_agent_port=0, **own,
    )
    try:
        return act(GcsClient(address="127.0.0.1:" + os.environ["PORT"]))
    finally:
        store.process.kill()
        store.process.wait()

with tempfile.TemporaryDirectory() as folder:
    with_store(folder, lambda client: client.internal_kv_put(b"key", b"value", True, b"a-namespace"))
    print("kept", with_store(folder, lambda client: client.internal_kv_get(b"key", b"a-namespace")))
assert cleanup_redis_storage("127.0.0.1", port, password, False, "uid-of-a-cluster", "ray")
print("left", sorted(found.scan_iter("RAYuid-of-a-cluster@*")))
"""


@pytest.mark.ray
def test_ray_keeps_its_state_there_and_kuberay_removes_it(server: ComponentRedis) -> None:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_external_storage_namespace": "uid-of-a-cluster",
        "REDIS_PASSWORD": server.ray_password,
        "URL": server.ray_url,
        "PORT": str(free_port()),
    }
    done = subprocess.run(
        [sys.executable, "-c", CONTROL_STORE], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kept, left = [line for line in done.stdout.splitlines() if line.startswith(("kept", "left"))]
    assert kept == "kept b'value'"
    assert left == "left []"
