"""The platform on a Ray cluster of several nodes on this machine, with tiny models in float32; each part can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from pydantic import SecretStr
from ray import serve
from ray._private import ray_constants
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig
from support.adapters import random_peft_adapter, random_streams, rename_base, write_own_streams
from support.api_app import form_files
from support.load import Answer, Question
from support.otlp import Collector, collecting
from support.processes import command, descendants, eventually, free_port
from support.redis_server import RedisServer, running_redis
from support.tiny_model import save_tiny_model

from deployments.app import build_application
from deployments.gateway import APP_NAME
from slipstream.config import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
ADMIN_KEY = "an-admin-key-of-a-test"
METRICS_KEY = "a-metrics-key-of-a-test"
ADAPTERS = 3
_NODE: dict[str, Any] = {"object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1", "include_dashboard": False}
WORKER = {**_NODE, "num_cpus": 8, "resources": {"engine": 4}}  # takes engines; the head takes gateways
EDGE: dict[str, Any] = {"gateway_cpus": 0.1, "gateway_resources": {"edge": 1}, "drain_s": 20}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Timings of Ray's own that only make tests slow; and its store in a Redis that outlives it.
_FAST = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "60",
    "RAY_external_storage_namespace": "slipstream-test",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what keeps Ray's addresses on loopback
    "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    "OTEL_BSP_SCHEDULE_DELAY": "100",
}


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables for the processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass
class Platform:
    """A running one. `folder` holds everything; `redis` is the registry's."""

    cluster: Any
    folder: Path
    redis: RedisServer
    port: int
    collector: Collector  # of spans of those requests whose client asks for a trace
    keys: dict[str, str] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    answers: dict[Question, Answer] = field(default_factory=dict)  # of `support.load`, from before the first fault
    nodes: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def settings(self, **more: Any) -> Settings:
        return load_settings(
            home=self.folder / "home",
            redis_url=SecretStr(self.redis.url),
            admin_key=SecretStr(ADMIN_KEY),
            metrics_key=SecretStr(METRICS_KEY),
            otlp_endpoint=self.collector.url,
            **more,
        )

    def model(self, name: str, hidden: int, **more: Any) -> dict[str, Any]:
        """Settings of a tiny model, which is made."""
        path = self.folder / f"model-{name}"
        if not path.exists():
            save_tiny_model(path, hidden=hidden)
        own = {"id": name, "base_model": str(path), "dtype": "float32", "device": "cpu", "engine_cpus": 0.5}
        own |= {"engine_resources": {"engine": 1}}
        return {**own, "engine_threads": 1, "kv_cache_bytes": 4 << 20, "max_num_seqs": 16, **more}

    def run(self, settings: Settings) -> None:
        """Deploy and wait until it answers; again = a rolling update."""
        serve.run(build_application(settings), name=APP_NAME, route_prefix="/", blocking=False)
        assert eventually(self.ready, 240), serve.status()

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == httpx.codes.OK
        return False

    def admin(self, path: str, method: str = "GET", tenant: str | None = None, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"} | ({"X-Slipstream-Tenant": tenant} if tenant else {})
        answer = httpx.request(method, self.url + path, headers=headers, timeout=30, trust_env=False, **more)
        assert answer.is_success, answer.text
        return answer.json()

    def publish(self, base: str, model: Any) -> None:
        """Some Turbo LoRAs for a base."""
        for i in range(ADAPTERS):
            name = f"{base}-{i}"
            self.publish_one(base, model, name, i)
            self.adapters.append(name)

    def publish_one(self, base: str, model: Any, name: str, seed: int) -> None:
        """One that questions do not name."""
        folder = self.folder / f"adapter-{name}"
        random_peft_adapter(model, folder, seed=seed, r=4, target_modules=ALL_LINEAR)
        rename_base(folder, base)
        write_own_streams(folder, random_streams(model.config.hidden_size, 3, rank=4, seed=seed), base_model=base)
        form = {"name": name, "base": base}
        self.admin("/v1/adapters", "POST", tenant="acme", data=form, files=form_files(folder))

    def used(self) -> tuple[int, int]:
        """Requests and answer tokens that were counted so far."""
        total = self.admin("/v1/usage", tenant="acme")["total"]
        return total["requests"], total["completion_tokens"]

    async def used_at_rest(self) -> tuple[int, int]:
        """The same, once what has just been answered is counted: gateways bring that to Redis afterwards."""
        before, found = (-1, -1), await asyncio.to_thread(self.used)
        while before != found:
            await asyncio.sleep(0.5)
            before, found = found, await asyncio.to_thread(self.used)
        return found

    async def counted(self, before: tuple[int, int], answered: int, tokens: int) -> bool:
        """Whether usage grows by exactly so much, once gateways have brought it to Redis."""
        wanted = (before[0] + answered, before[1] + tokens)
        for _ in range(100):
            found = await asyncio.to_thread(self.used)
            if found == wanted:
                await asyncio.sleep(0.5)
                return await asyncio.to_thread(self.used) == wanted
            await asyncio.sleep(0.1)
        return False

    def key(self, tenant: str = "acme") -> str:
        if tenant not in self.keys:
            self.keys[tenant] = self.admin("/v1/keys", "POST", json={"tenant": tenant, "label": ""})["secret"]
        return self.keys[tenant]

    def client(self, retries: int = 0, tenant: str = "acme") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key(tenant), max_retries=retries, timeout=120)

    # -- what runs ------------------------------------------------------------------------------------------------

    def view(self, model: str) -> Mapping[str, Any]:
        """`/v1/cluster`'s entry of a model."""
        found: Mapping[str, Any] = next(m for m in self.admin("/v1/cluster")["models"] if m["model"] == model)
        return found

    def replicas(self, model: str) -> Sequence[Mapping[str, Any]]:
        replicas: Sequence[Mapping[str, Any]] = self.view(model)["replicas"]
        return replicas

    def wait_for(self, model: str, count: int, timeout_s: float = 180) -> None:
        """Until so many replicas answer and none comes or goes."""

        def there() -> bool:
            with contextlib.suppress(AssertionError, httpx.HTTPError):
                found = self.view(model)
                return len(found["replicas"]) == count and found["states"] == ({"RUNNING": count} if count else {})
            return False

        assert eventually(there, timeout_s), serve.status()

    def actor_pids(self, name: str = "") -> list[int]:
        """Processes of actors whose title contains `name`."""
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        raylets = [node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid for node in nodes]
        children = set[int]().union(*map(descendants, raylets))
        return [pid for pid in children if command(pid).startswith("ray::") and name in command(pid)]

    # -- faults ---------------------------------------------------------------------------------------------------

    def kill_gcs(self, away_s: float) -> None:
        """Ray's control store dies, and comes back with what its Redis kept."""
        head = self.cluster.head_node
        head.kill_gcs_server()
        time.sleep(away_s)
        head._gcs_address = head._gcs_client = None
        head.start_gcs_server()


def kill(pid: int) -> None:
    """At once, by its own pid."""
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def platform(workers: int = 2) -> Iterator[Platform]:
    """Nodes, Serve and a registry; nothing deployed yet."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slip-")))
        registry = stack.enter_context(running_redis())
        collector = stack.enter_context(collecting())
        gcs = stack.enter_context(running_redis())
        paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
        kept = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{gcs.port}", "RAY_REDIS_PASSWORD": gcs.password, "PYTHONPATH": paths}
        stack.enter_context(environment(**kept, **_FAST))
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        cluster = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,  # else what a test starts from a thread ends with that thread
            head_node_args={
                "num_cpus": 8,
                "resources": {"edge": 2},
                "gcs_server_port": free_port(),
                "redis_password": gcs.password,
                **_NODE,
            },
        )
        stack.callback(cluster.shutdown)
        nodes = [cluster.add_node(**WORKER) for _ in range(workers)]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        stack.callback(ray.shutdown)
        port = free_port()
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host="127.0.0.1", port=port),
            logging_config=LoggingConfig(logs_dir=str(folder / "logs"), enable_access_log=False, log_level="WARNING"),
        )
        stack.callback(serve.shutdown)
        yield Platform(cluster, folder, registry, port, collector, nodes=nodes)
