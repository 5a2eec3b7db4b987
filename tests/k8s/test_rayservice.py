"""What the overlays' RayServices say: the operator's own rules, and that settings, worker groups and time limits fit."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, SecretStr
from ray.serve import Application
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema
from support.manifests import OVERLAYS, Object, folder, kustomize, pods, rayservice
from support.serve_apps import deployments

from deployments import drain_node
from deployments.app import AppArgs, build, build_application
from deployments.replica_plan import on_its_cores
from slipstream.config import ModelSettings, Settings, load_settings

SECRETS = {"SLIPSTREAM_REDIS_URL": "redis://nowhere", "SLIPSTREAM_ADMIN_KEY": "k" * 16}
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def service(overlay: str) -> Object:
    return rayservice(kustomize(folder(overlay)))


def serve(overlay: str) -> Object:
    page: Object = yaml.safe_load(service(overlay)["spec"]["serveConfigV2"])
    return page


def settings(overlay: str) -> Settings:
    """What the pods will run with."""
    (application,) = serve(overlay)["applications"]
    return Settings(**application["args"], admin_key=SecretStr("k" * 16))


def groups(overlay: str) -> dict[str, Object]:
    return {group["groupName"]: group for group in service(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


# The Serve config


def unknown_keys(value: Object, model: type[BaseModel], where: str) -> Iterator[str]:
    """Serve takes unknown keys silently, for the sake of newer versions; a misspelt one would do nothing."""
    yield from (f"{where}.{key}" for key in value if key not in model.model_fields)


def serve_problems(page: Object) -> list[str]:
    found = [*unknown_keys(page, ServeDeploySchema, "serve")]
    found += unknown_keys(page["http_options"], HTTPOptionsSchema, "http_options")
    for application in page["applications"]:
        found += unknown_keys(application, ServeApplicationSchema, "application")
        found += [f"args.{key}" for key in application["args"] if key not in AppArgs.model_fields]
        for model in application["args"]["models"]:
            found += unknown_keys(model, ModelSettings, "model")
    return found


@each_overlay
def test_the_serve_config_has_no_unknown_key(overlay: str) -> None:
    ServeDeploySchema.model_validate(serve(overlay))
    assert serve_problems(serve(overlay)) == []


@pytest.mark.parametrize(
    "where", ["", "http_options", "applications.0", "applications.0.args", "applications.0.args.models.0"]
)
def test_an_unknown_key_of_the_serve_config_is_found(where: str) -> None:
    page = serve("local")
    node: Any = page
    for part in filter(None, where.split(".")):
        node = node[int(part) if part.isdigit() else part]
    node["num_replica"] = 2
    assert len(serve_problems(page)) == 1


@each_overlay
def test_the_pods_run_what_the_command_line_would(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of settings, two ways: through the generated Serve config, and read by the command line itself."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (application,) = serve(overlay)["applications"]
    assert (application["name"], application["route_prefix"]) == ("slipstream", "/")
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    on_pods = deployments(build(AppArgs(**application["args"])))
    monkeypatch.setenv("SLIPSTREAM_CONFIG", str(folder(overlay) / "slipstream.yaml"))
    read = load_settings()
    here = deployments(_application(read))
    assert on_pods == here
    assert set(here) == {"Gateway", *(f"EngineReplica-{model.slug}" for model in read.models)}


def _application(read: Settings) -> Application:
    return build_application(read.model_copy(update={"models": tuple(map(on_its_cores, read.models))}))


# KubeRay's own rules (ray-operator/controllers/ray/utils/validation.go), which no schema says


def operator_problems(found: Object) -> list[str]:
    wrong = []
    spec, cluster = found["spec"], found["spec"]["rayClusterConfig"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", found["metadata"]["name"]):
        wrong.append("the RayService's name is no label of at most 47 characters")
    for group in [head, *workers]:
        who = group.get("groupName", "head")
        parameters = set(group["rayStartParams"])
        if group.get("resources") and parameters & {"num-cpus", "num-gpus", "memory", "resources"}:
            wrong.append(f"{who}: resources are given in two places")
        if parameters & {"labels", "redis-password", "redis-username"}:
            wrong.append(f"{who}: rayStartParams has what belongs elsewhere")
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            wrong.append(f"{who}: autoscaler v2 wants restartPolicy unset")
    names = {variable["name"] for variable in head["template"]["spec"]["containers"][0]["env"]}
    for name in sorted(names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}):
        wrong.append(f"head: {name} is KubeRay's to set")
    if cluster["authOptions"]["mode"] == "token" and tuple(map(int, cluster["rayVersion"].split("."))) < (2, 52):
        wrong.append("token authentication needs Ray 2.52")
    if spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade":
        if not cluster["enableInTreeAutoscaling"]:
            wrong.append("an incremental upgrade needs the autoscaler")
        if "clusterUpgradeOptions" not in spec["upgradeStrategy"]:
            wrong.append("an incremental upgrade needs clusterUpgradeOptions")
    return wrong


@each_overlay
def test_the_operator_accepts_it(overlay: str) -> None:
    assert operator_problems(service(overlay)) == []
    upgrade = service(overlay)["spec"]["upgradeStrategy"]
    assert upgrade["type"] == "NewCluster", "pods that change are never stopped before new ones serve"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("headGroupSpec.resources", {"CPU": "1"}),
        ("headGroupSpec.rayStartParams.redis-password", "x"),
        ("headGroupSpec.template.spec.restartPolicy", "Always"),
        ("rayVersion", "2.51.0"),
    ],
)
def test_what_the_operator_refuses_is_found(where: str, value: object) -> None:
    broken = copy.deepcopy(service("local"))
    node: Any = broken["spec"]["rayClusterConfig"]
    *path, last = where.split(".")
    for part in path:
        node = node[part]
    node[last] = value
    assert len(operator_problems(broken)) == 1


def test_ray_is_the_version_that_is_installed() -> None:
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    for overlay in OVERLAYS:
        assert f"ray=={service(overlay)['spec']['rayClusterConfig']['rayVersion']}\n" in pinned


# Settings, worker groups and time limits


@each_overlay
def test_the_head_serves_nothing(overlay: str) -> None:
    spec = service(overlay)["spec"]
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["excludeHeadPodFromServeSvc"] is True


def demands(read: Settings) -> Iterator[tuple[dict[str, float], int, int]]:
    """What is placed together, as Ray resources; how often at least, and at most."""
    most = read.max_gateway_replicas or read.gateway_replicas
    yield {"CPU": read.gateway_cpus, **read.gateway_resources}, read.gateway_replicas, most
    yield (
        {"CPU": read.training_cpus, "GPU": read.training_gpus, **read.training_resources},
        0,
        read.max_training_jobs,
    )
    for model in read.models:
        rank = {"CPU": model.engine_cpus, "GPU": model.engine_gpus, **model.engine_resources}
        whole = {name: model.tensor_parallel_size * amount for name, amount in rank.items()}
        yield whole, model.min_replicas, model.most_replicas


def capacity(group: Object) -> dict[str, float]:
    """A pod's Ray resources, as KubeRay finds them."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    own = {name: float(amount) for name, amount in group.get("resources", {}).items()}
    return {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0)), **own}


def pods_needed(read: Settings, found: dict[str, Object], *, at_most: bool) -> dict[str, int]:
    """How many pods each group must be able to have; each demand goes to the one group that fits it best."""
    used: dict[str, dict[str, float]] = {name: {} for name in found}
    for asked, least, most in demands(read):
        wanted = {name: amount for name, amount in asked.items() if amount}
        fitting = [
            name
            for name, group in found.items()
            if all(capacity(group).get(resource, 0) >= amount for resource, amount in wanted.items())
        ]
        assert fitting, f"no worker group has a pod for {wanted}"
        wasted = {name: len([1 for left in capacity(found[name]).values() if left]) for name in fitting}
        chosen = min(fitting, key=lambda name: wasted[name])
        for resource, amount in wanted.items():
            used[chosen][resource] = used[chosen].get(resource, 0) + amount * (most if at_most else least)
    return {
        name: max((math.ceil(amount / capacity(found[name])[resource]) for resource, amount in use.items()), default=0)
        for name, use in used.items()
    }


@each_overlay
def test_groups_are_as_large_as_what_may_run_in_them(overlay: str) -> None:
    read, found = settings(overlay), groups(overlay)
    assert pods_needed(read, found, at_most=True) == {name: group["maxReplicas"] for name, group in found.items()}
    for name, least in pods_needed(read, found, at_most=False).items():
        assert least <= found[name]["minReplicas"] <= found[name]["replicas"] <= found[name]["maxReplicas"]


def test_a_model_without_a_group_is_found() -> None:
    read = settings("gpu-tp")
    stray = read.models[0].model_copy(update={"engine_resources": {"tp8": 1.0}})
    with pytest.raises(AssertionError, match="no worker group"):
        pods_needed(read.model_copy(update={"models": (stray,)}), groups("gpu-tp"), at_most=True)


def test_a_pod_of_a_tensor_parallel_group_holds_one_replica_and_nothing_else() -> None:
    """So a placement group, which may be spread when it must, has no reason to be."""
    found, read = groups("gpu-tp"), settings("gpu-tp")
    (wide,) = [model for model in read.models if model.tensor_parallel_size > 1]
    ((resource, share),) = wide.engine_resources.items()
    (group,) = [group for group in found.values() if resource in group.get("resources", {})]
    assert capacity(group)[resource] == capacity(group)["GPU"] == wide.tensor_parallel_size * share
    others = [model for model in read.models if model is not wide]
    assert all(resource not in model.engine_resources and model.engine_resources for model in others)
    assert read.training_resources, "a training job would take a GPU of that pod"


def test_where_gateways_have_a_group_they_run_nowhere_else() -> None:
    for overlay in OVERLAYS:
        found = groups(overlay)
        if "gateways" in found:
            assert set(settings(overlay).gateway_resources) == set(found["gateways"]["resources"]) == {"gateway"}
            assert not capacity(found["gateways"])["GPU"]


@each_overlay
def test_draining_fits_into_the_grace_periods(overlay: str) -> None:
    spec, read = service(overlay)["spec"], settings(overlay)
    assert read.drain_s < read.gateway_drain_s, "a gateway's requests may wait for an engine"
    assert read.gateway_drain_s < spec["rayClusterDeletionDelaySeconds"]
    for group in groups(overlay).values():
        pod = group["template"]["spec"]
        *command, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", drain_node.__name__]
        assert read.gateway_drain_s < float(seconds) < pod["terminationGracePeriodSeconds"]


@each_overlay
def test_volumes_hold_what_ray_writes(overlay: str) -> None:
    """The root file system is read-only."""
    for pod in pods(service(overlay)):
        spec = pod["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts) >= {"/tmp", "/tmp/ray"}
            assert set(mounts.values()) <= set(volumes)
        ray = spec["containers"][0]
        mounted = {mount["mountPath"] for mount in ray["volumeMounts"]}
        environment = {variable["name"]: variable.get("value") for variable in ray["env"]}
        assert mounted >= {"/dev/shm", environment["HOME"], str(settings(overlay).home)}
        store = 268435456
        assert volumes["shared-mem"]["emptyDir"]["medium"] == "Memory"
        assert _bytes(volumes["shared-mem"]["emptyDir"]["sizeLimit"]) > store
        assert _bytes(volumes["shared-mem"]["emptyDir"]["sizeLimit"]) < _bytes(ray["resources"]["limits"]["memory"])


def _bytes(quantity: str) -> int:
    found = re.fullmatch(r"(\d+)([MG])i", quantity)
    assert found
    return int(found[1]) << {"M": 20, "G": 30}[found[2]]


def test_ha_loses_no_service_with_a_node() -> None:
    found, read = groups("ha"), settings("ha")
    assert read.gateway_replicas >= 3
    assert all(model.min_replicas >= 2 for model in read.models)
    budgets = {
        entry["metadata"]["name"]: entry for entry in kustomize(folder("ha")) if entry["kind"] == "PodDisruptionBudget"
    }
    assert set(budgets) == set(found)
    for name, budget in budgets.items():
        assert budget["spec"]["selector"]["matchLabels"]["ray.io/group"] == name
        assert 1 <= budget["spec"]["minAvailable"] < found[name]["minReplicas"], "one may go"
        keys = [each["topologyKey"] for each in found[name]["template"]["spec"]["topologySpreadConstraints"]]
        assert keys == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
        own = found[name]["template"]["metadata"]["labels"]
        assert own["app.kubernetes.io/component"] == "ray-worker"
