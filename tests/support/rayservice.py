"""What KubeRay does with a RayService, done on this machine: a Ray node, and its Serve config through Ray's REST API.

What a laptop forces is changed and nothing else: see `for_this_machine`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray._private import ray_constants
from ray.cluster_utils import Cluster
from support.otlp import collecting
from support.processes import eventually, free_port
from support.ray_cluster import ADMIN_KEY, ROOT, Platform, environment
from support.redis_server import running_redis
from support.s3_server import running_s3
from support.tiny_model import save_tiny_model

HOME = "/var/lib/slipstream"  # what the manifests mount; here it is a temporary folder
_LOOPBACK: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}
_MODEL = {"dtype": "float32", "device": "cpu", "engine_threads": 1, "kv_cache_bytes": 4 << 20}
_MOST_REPLICAS = 2  # each is a process that imports torch


def read_rayservice(*paths: Path) -> dict[str, Any]:
    """A RayService out of files: the first is the document, the others are merged into its `spec`."""
    document, *patches = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths)
    for patch in patches:
        document["spec"] |= patch["spec"]
    found: dict[str, Any] = document
    return found


def serve_config(rayservice: Mapping[str, Any]) -> dict[str, Any]:
    """`serveConfigV2` as KubeRay sends it."""
    config: dict[str, Any] = yaml.safe_load(rayservice["spec"]["serveConfigV2"])
    return config


def for_this_machine(config: Mapping[str, Any], folder: Path, port: int, model: Path) -> dict[str, Any]:
    """The same application on one laptop: address, data folder, base model (tiny, float32), and how many replicas fit.

    Import path, route, names and options of deployments, and every other setting stay.
    """
    changed = copy.deepcopy(dict(config))
    changed["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = changed["applications"]
    args = application["args"]
    args["home"] = str(folder / "home")
    for entry in args["models"]:
        entry |= {**_MODEL, "base_model": str(model)}
        entry["max_replicas"] = min(entry.get("max_replicas") or 1, _MOST_REPLICAS)
    return changed


def cpus(rayservice: Mapping[str, Any]) -> int:
    """Of all worker pods that the autoscaler may start: here they are one node."""
    groups = rayservice["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    total = 0
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        asked = str(container["resources"]["requests"]["cpu"])
        cores = float(asked.removesuffix("m")) / (1000 if asked.endswith("m") else 1)
        total += math.ceil(cores) * group["maxReplicas"]
    return total


def pod_environment(rayservice: Mapping[str, Any], secrets: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The first worker container's variables; `secrets` by the Secret's keys. A required one that is missing raises."""
    group = rayservice["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    found = {}
    for variable in group["template"]["spec"]["containers"][0]["env"]:
        if "value" in variable:
            found[variable["name"]] = variable["value"].replace(HOME, str(folder / "home"))
        else:
            reference = variable["valueFrom"]["secretKeyRef"]
            if reference["key"] in secrets or not reference.get("optional"):
                found[variable["name"]] = secrets[reference["key"]]
    return found


@dataclass
class AppliedService(Platform):
    """A running one that takes Serve configs."""

    dashboard: str = ""
    rayservice: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The manifest's, for this machine."""
        return for_this_machine(serve_config(self.rayservice), self.folder, self.port, self.folder / "model")

    def apply(self, config: Mapping[str, Any]) -> None:
        """PUT it, as the operator does: JSON, with Ray's token."""
        answer = self._rest("PUT", content=json.dumps(config), headers={"Content-Type": "application/json"})
        assert answer.status_code == httpx.codes.OK, answer.text

    def details(self) -> dict[str, Any]:
        """What Serve says of the one application."""
        applications = self._rest("GET").json()["applications"]
        found: dict[str, Any] = applications.get("slipstream", {"status": "NOT_STARTED"})
        return found

    def settled(self, timeout_s: float = 240) -> str:
        """Serve's word for the application once it is neither starting nor changing."""
        status = "NOT_STARTED"

        def settled() -> bool:
            nonlocal status
            with contextlib.suppress(httpx.TransportError):
                status = self.details()["status"]
            return status in {"RUNNING", "DEPLOY_FAILED", "UNHEALTHY"}

        eventually(settled, timeout_s)
        return status

    def _rest(self, method: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"} | more.pop("headers", {})
        url = f"{self.dashboard}/api/serve/applications/"
        return httpx.request(method, url, headers=headers, timeout=240, trust_env=False, **more)


@contextlib.contextmanager
def ray_service(rayservice: Mapping[str, Any]) -> Iterator[AppliedService]:
    """A Ray node with its dashboard, a registry and a bucket, in the environment of the manifest's pods; nothing applied."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slip-")))
        (folder / "home").mkdir()
        redis = stack.enter_context(running_redis())
        (application,) = serve_config(rayservice)["applications"]
        secrets = {"redis-url": redis.url, "admin-key": ADMIN_KEY}
        blob_url = application["args"].get("blob_url", "")
        if blob_url.startswith("s3://"):
            stack.enter_context(environment(**stack.enter_context(running_s3(blob_url.removeprefix("s3://")))))
        paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
        pod = pod_environment(rayservice, secrets, folder)
        # The last one is what keeps Ray's addresses on loopback.
        stack.enter_context(environment(**pod, PYTHONPATH=paths, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"))
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        dashboard = free_port()
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": cpus(rayservice),
                "gcs_server_port": free_port(),
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": dashboard,
                "dashboard_agent_listen_port": free_port(),
                **_LOOPBACK,
            },
        )
        stack.callback(cluster.shutdown)
        save_tiny_model(folder / "model", hidden=32)
        yield AppliedService(
            cluster,
            folder,
            redis,
            free_port(),
            stack.enter_context(collecting()),
            dashboard=f"http://127.0.0.1:{dashboard}",
            rayservice=rayservice,
        )
