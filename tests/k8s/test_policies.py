"""What the manifests must not allow: checkov's rules, Kubernetes' restricted pods, and who may talk to whom."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kube_tools import checkov, run
from support.manifests import EVERYTHING, K8S, OVERLAYS, Object, folder, kustomize, pods, rayservice

ALL = (*OVERLAYS, EVERYTHING.name)
# Of the head alone: the token is the autoscaler's, whose container is KubeRay's and has no probes.
HEAD_MAY = {
    "checkov.io/skip1": "CKV_K8S_38=Ray's autoscaler asks the Kubernetes API for pods",
    "checkov.io/skip2": "CKV_K8S_8=KubeRay's autoscaler container has no probe",
    "checkov.io/skip3": "CKV_K8S_9=KubeRay's autoscaler container has no probe",
}
Break = Callable[[Object], None]


def plain_objects(overlay: str) -> list[Object]:
    """What an overlay builds to, with the pods that KubeRay makes in place of the RayService."""
    found = kustomize(folder(overlay))
    made = list(pods(rayservice(found)))
    made[0]["metadata"]["annotations"] = HEAD_MAY
    return [entry for entry in found if entry["kind"] != "RayService"] + made


def container(pod: Object) -> Object:
    result: Object = pod["spec"]["containers"][0]
    return result


def _as_root(pod: Object) -> None:
    pod["spec"]["securityContext"] = {"runAsUser": 0}


def _without_limits(pod: Object) -> None:
    del container(pod)["resources"]["limits"]


def _latest(pod: Object) -> None:
    container(pod)["image"] = "slipstream:latest"


def _writable(pod: Object) -> None:
    container(pod)["securityContext"]["readOnlyRootFilesystem"] = False


def _all_capabilities(pod: Object) -> None:
    del container(pod)["securityContext"]["capabilities"]


def _host_network(pod: Object) -> None:
    pod["spec"]["hostNetwork"] = True


def _privileged(pod: Object) -> None:
    container(pod)["securityContext"]["privileged"] = True


def _token(pod: Object) -> None:
    pod["spec"]["automountServiceAccountToken"] = True


def _no_seccomp(pod: Object) -> None:
    del pod["spec"]["securityContext"]["seccompProfile"]


def _host_path(pod: Object) -> None:
    pod["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/"}})


BROKEN: dict[str, tuple[Break, str]] = {
    "root": (_as_root, "CKV_K8S_23"),
    "limits": (_without_limits, "CKV_K8S_13"),
    "latest": (_latest, "CKV_K8S_14"),
    "writable": (_writable, "CKV_K8S_22"),
    "capabilities": (_all_capabilities, "CKV_K8S_37"),
    "host-network": (_host_network, "CKV_K8S_19"),
    "privileged": (_privileged, "CKV_K8S_16"),
    "token": (_token, "CKV_K8S_38"),
}


@pytest.fixture(scope="module")
def linted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Overlay or broken copy -> what checkov says against it. One run for all: it takes ten seconds to start."""
    inputs = tmp_path_factory.mktemp("checkov")
    for overlay in ALL:
        (inputs / f"{overlay}.yaml").write_text(yaml.safe_dump_all(plain_objects(overlay)), encoding="utf-8")
    for name, (damage, _) in BROKEN.items():
        worker = copy.deepcopy(plain_objects("local")[-1])
        damage(worker)
        (inputs / f"broken-{name}.yaml").write_text(yaml.safe_dump(worker), encoding="utf-8")
    config = Path(__file__).with_name("checkov.yaml")
    options = ["--skip-download", "--quiet", "--compact", "--output=json", f"--config-file={config}"]
    done = run(*checkov(), f"--directory={inputs}", *options, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 1000
    found: dict[str, set[str]] = {}
    for failed in report["results"]["failed_checks"]:
        said = f"{failed['check_id']} {failed['check_name']}: {failed['resource']}"
        found.setdefault(Path(failed["file_path"]).stem, set()).add(said)
    return found


@pytest.mark.parametrize("overlay", ALL)
def test_checkov_has_nothing_to_say(overlay: str, linted: dict[str, set[str]]) -> None:
    assert linted.get(overlay, set()) == set()


@pytest.mark.parametrize("name", BROKEN)
def test_checkov_finds_what_is_broken(name: str, linted: dict[str, set[str]]) -> None:
    wanted = BROKEN[name][1]
    assert wanted in {said.split()[0] for said in linted[f"broken-{name}"]}


# Pod Security Admission, level `restricted` (kubernetes.io/docs/concepts/security/pod-security-standards), as the
# namespace enforces it. No cluster is here to ask.

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def not_restricted(pod: Object) -> Iterator[str]:
    spec = pod["spec"]
    own = spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", []):
        if not set(volume) - {"name"} <= _VOLUMES:
            yield f"volume {volume['name']}"
    for each in [*spec["containers"], *spec.get("initContainers", [])]:
        found = each.get("securityContext", {})
        if found.get("privileged") or found.get("allowPrivilegeEscalation") is not False:
            yield f"{each['name']}: allowPrivilegeEscalation"
        if found.get("capabilities", {}).get("drop") != ["ALL"] or set(found["capabilities"]) > {"drop"}:
            yield f"{each['name']}: capabilities"
        if not found.get("runAsNonRoot", own.get("runAsNonRoot")) or found.get("runAsUser", own.get("runAsUser")) == 0:
            yield f"{each['name']}: runAsNonRoot"
        if found.get("seccompProfile", own.get("seccompProfile")) != {"type": "RuntimeDefault"}:
            yield f"{each['name']}: seccompProfile"
        if any("hostPort" in port for port in each.get("ports", [])):
            yield f"{each['name']}: hostPort"


def pod_templates(overlay: str) -> Iterator[Object]:
    found = kustomize(folder(overlay))
    yield from pods(rayservice(found))
    yield from (entry["spec"]["template"] for entry in found if entry["kind"] == "StatefulSet")


@pytest.mark.parametrize("overlay", ALL)
def test_pods_are_restricted_as_their_namespace_demands(overlay: str) -> None:
    (namespace,) = [entry for entry in kustomize(folder(overlay)) if entry["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    templates = list(pod_templates(overlay))
    assert len(templates) >= 2
    for template in templates:
        assert list(not_restricted(template)) == []
        for each in template["spec"]["containers"]:
            assert set(each["resources"]["limits"]) >= {"cpu", "memory"}
            assert each["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize(
    "damage",
    [_as_root, _all_capabilities, _host_network, _privileged, _no_seccomp, _host_path],
    ids=lambda f: f.__name__,
)
def test_a_pod_that_is_not_restricted_is_found(damage: Break) -> None:
    pod = copy.deepcopy(plain_objects("local")[-1])
    damage(pod)
    assert list(not_restricted(pod))


# Who may talk to whom


@cache
def _policies(overlay: str) -> tuple[Object, ...]:
    return tuple(entry for entry in kustomize(folder(overlay)) if entry["kind"] == "NetworkPolicy")


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return wanted and all(labels.get(each["key"]) in each["values"] for each in expressions)


def _peer(peer: Object, namespace: dict[str, str] | None, labels: dict[str, str]) -> bool:
    """Whether a pod is meant; `namespace` is None for our own."""
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], namespace or {}):
            return False
    elif namespace is not None:
        return False
    return _matches(peer.get("podSelector", {}), labels)


def may_reach(
    overlay: str, source: dict[str, str], target: dict[str, str], port: int, *, namespace: dict[str, str] | None = None
) -> bool:
    """As a CNI decides it at the target: some policy that selects it lets the source in on the port."""
    selecting = [each for each in _policies(overlay) if _matches(each["spec"]["podSelector"], target)]
    assert any("Ingress" in each["spec"]["policyTypes"] for each in selecting)
    for policy in selecting:
        for rule in policy["spec"].get("ingress", []):
            ports = {each["port"] for each in rule["ports"]} if "ports" in rule else {port}
            if port in ports and any(_peer(peer, namespace, source) for peer in rule["from"]):
                return True
    return False


COMPONENT = "app.kubernetes.io/component"
HEAD, WORKER, REDIS = ({COMPONENT: part} for part in ("ray-head", "ray-worker", "redis"))
CLIENT = {"slipstream-client": "true"}
MONITORING = {"slipstream-monitoring": "true"}
OPERATOR = {COMPONENT: "kuberay-operator"}
ELSEWHERE = {"kubernetes.io/metadata.name": "elsewhere"}


@pytest.mark.parametrize(
    ("source", "namespace", "target", "ports"),
    [
        (WORKER, None, HEAD, {6379, 8265, 10001, 8080, 8000, 52365, 20000}),
        (HEAD, None, WORKER, {8000, 8080, 20000}),
        (WORKER, None, REDIS, {6379}),
        (HEAD, None, REDIS, {6379}),
        (REDIS, None, HEAD, set()),
        (OPERATOR, ELSEWHERE, HEAD, {8265, 8000}),
        (OPERATOR, ELSEWHERE, WORKER, set()),
        ({}, CLIENT, WORKER, {8000}),
        ({}, CLIENT, HEAD, set()),
        ({}, CLIENT, REDIS, set()),
        ({}, MONITORING, HEAD, {8000, 8080, 44217, 44227}),
        ({}, MONITORING, REDIS, set()),
        ({}, ELSEWHERE, HEAD, set()),
        ({}, ELSEWHERE, WORKER, set()),
        ({}, ELSEWHERE, REDIS, set()),
        ({"app": "debug"}, None, WORKER, set()),
        ({"app": "debug"}, None, REDIS, set()),
    ],
)
def test_only_who_must_may_talk(
    source: dict[str, str], namespace: dict[str, str] | None, target: dict[str, str], ports: set[int]
) -> None:
    tried = {6379, 8265, 10001, 8080, 8000, 52365, 20000, 44217, 44227}
    reached = {port for port in tried if may_reach("local", source, target, port, namespace=namespace)}
    assert reached & ports == ports
    assert reached == ports or (namespace is None and source in (HEAD, WORKER) and target in (HEAD, WORKER))


@pytest.mark.parametrize("overlay", ALL)
def test_nothing_leaves_but_what_is_named(overlay: str) -> None:
    """Every pod's egress is restricted; where it goes is written in k8s/README.md as well."""
    assert any(each["spec"]["podSelector"] == {} for each in _policies(overlay)), "all pods, also those of tomorrow"
    allowed: dict[str, set[int]] = {}
    for part in ("ray-head", "ray-worker", "redis"):
        for policy in _policies(overlay):
            if _matches(policy["spec"]["podSelector"], {COMPONENT: part}):
                for rule in policy["spec"].get("egress", []):
                    allowed.setdefault(part, set()).update(port["port"] for port in rule.get("ports", []))
    redis = {6379} if overlay not in ("ha", EVERYTHING.name) else {6379, 6380, 26379}
    assert allowed == {"ray-head": {53, 443, 6443, 8443, 16443} | redis, "ray-worker": {53, 443} | redis}


@pytest.mark.parametrize("overlay", ALL)
def test_nothing_is_published_but_through_an_ingress(overlay: str) -> None:
    for entry in kustomize(folder(overlay)):
        if entry["kind"] == "Service":
            assert entry["spec"].get("type", "ClusterIP") == "ClusterIP"
        if entry["kind"] in ("Ingress", "HTTPRoute"):
            assert {"slipstream-serve-svc"} == set(_backends(entry))
        if entry["kind"] == "RayService":
            head = entry["spec"]["rayClusterConfig"]["headGroupSpec"]
            assert not head.get("enableIngress")
            assert "serviceType" not in head
            assert "serveService" not in entry["spec"]


def _backends(entry: Any) -> Iterator[str]:
    if isinstance(entry, dict):
        if "backendRefs" in entry:
            yield from (each["name"] for each in entry["backendRefs"])
        if "service" in entry:
            yield entry["service"]["name"]
        for value in entry.values():
            yield from _backends(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from _backends(value)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_come_from_the_one_secret(overlay: str) -> None:
    """By the keys that k8s/README.md tells to make."""
    readme = (folder(overlay).parents[1] / "README.md").read_text(encoding="utf-8")
    plain = {"HOME", "HF_HOME", "RAY_USAGE_STATS_ENABLED", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"}
    plain |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"}
    for template in pod_templates(overlay):
        for variable in container(template)["env"]:
            if variable["name"] in plain:
                assert "valueFrom" not in variable
                continue
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == "slipstream"
            assert f"`{reference['key']}`" in readme


def test_the_secrets_script_makes_what_pods_ask_for(tmp_path: Path) -> None:
    """With a kubectl that notes what it is told, and knows no Secret."""
    noted = tmp_path / "noted"
    fake = tmp_path / "kubectl"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {noted}\ncase "$*" in *"get secret"*) exit 1;; esac\n', encoding="utf-8")
    fake.chmod(0o755)
    script = K8S / "examples" / "make-secret.sh"
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([script], env=path, text=True, capture_output=True, check=True)
    made = dict(re.findall(r"--from-literal=([a-z_-]+)=(\S+)", noted.read_text(encoding="utf-8")))
    assert f"Admin key: {made['admin-key']}" in done.stdout
    assert made["redis-url"] == f"redis://slipstream:{made['redis-password']}@slipstream-redis:6379/0"
    assert len(set(made.values())) == len(made), "no two alike"
    asked = {"auth_token"}  # KubeRay's own
    for template in pod_templates("local"):
        for variable in container(template)["env"]:
            reference = variable.get("valueFrom", {}).get("secretKeyRef", {"optional": True})
            asked |= set() if reference.get("optional") else {reference["key"]}
    assert set(made) == asked | {"ray-redis-password", "metrics-key"}


def test_ray_shows_a_token_everywhere() -> None:
    for overlay in ALL:
        cluster = rayservice(kustomize(folder(overlay)))["spec"]["rayClusterConfig"]
        assert cluster["authOptions"] == {"mode": "token", "secretName": "slipstream"}
