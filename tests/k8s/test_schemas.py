"""Everything that `k8s/` builds to is what is committed, and fits the schemas; a broken copy does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support.kube_schemas import problems
from support.manifests import (
    CHART,
    EVERYTHING,
    OVERLAYS,
    SNAPSHOTS,
    Object,
    folder,
    kustomize,
    name,
    pods,
    rayservice,
    serve_config,
    snapshot,
    values_schema,
)

ALL = (*OVERLAYS, EVERYTHING.name)
STALE = "what is generated differs from what is committed: run `make manifests` and look at the difference"


@pytest.mark.parametrize("overlay", ALL)
def test_it_builds_to_its_snapshot(overlay: str) -> None:
    assert snapshot(overlay) == (SNAPSHOTS / f"{overlay}.yaml").read_text(encoding="utf-8"), STALE


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_its_serve_config_is_what_its_settings_say(overlay: str) -> None:
    assert serve_config(overlay) == (folder(overlay) / "serve-config.yaml").read_text(encoding="utf-8"), STALE


def test_the_charts_schema_knows_the_settings_of_the_command_line() -> None:
    assert values_schema() == (CHART / "values.schema.json").read_text(encoding="utf-8"), STALE


def test_a_changed_setting_makes_the_committed_config_stale(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = (folder("local") / "serve-config.yaml").read_text(encoding="utf-8")
    text = (folder("local") / "slipstream.yaml").read_text(encoding="utf-8")
    (tmp_path / "slipstream.yaml").write_text(text.replace("max_replicas: 2", "max_replicas: 3"))
    monkeypatch.setattr("support.manifests.folder", lambda overlay: tmp_path)
    assert serve_config("local") != committed
    assert serve_config("local").replace("max_replicas: 3", "max_replicas: 2") == committed


@pytest.mark.parametrize("overlay", ALL)
def test_every_object_and_every_pod_fits_its_schema(overlay: str) -> None:
    found = kustomize(folder(overlay))
    assert len({name(entry) for entry in found}) == len(found) > 10
    wrong = {name(entry): problems(entry) for entry in [*found, *pods(rayservice(found))]}
    assert {key: value for key, value in wrong.items() if value} == {}


def test_no_object_holds_a_secret_or_lies_elsewhere() -> None:
    for overlay in ALL:
        for entry in kustomize(folder(overlay)):
            assert entry["kind"] != "Secret"
            assert (
                entry["metadata"]["labels"]["app.kubernetes.io/part-of"] == "slipstream" or entry["kind"] == "Namespace"
            )
            assert entry["metadata"].get("namespace", entry["metadata"]["name"]) == "slipstream"


HEAD = "spec.rayClusterConfig.headGroupSpec"
WORKERS = "spec.rayClusterConfig.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("kind", "where", "value"),
    [
        ("RayService", "spec.serveConfig", "x"),
        ("RayService", f"{HEAD}.template.spec.containers.0.imagePullPolice", "Always"),
        ("RayService", f"{WORKERS}.minReplicas", "one"),
        ("RayService", f"{WORKERS}.template.spec.containers.0.resources.limits.memory", "8 GB"),
        ("RayService", "spec.rayClusterConfig.authOptions.mode", "Token"),
        ("RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions.redisAdress", "x"),
        ("StatefulSet", "spec.replica", 1),
        ("StatefulSet", "spec.template.spec.containers.0.livenessProbe.period", 1),
        ("NetworkPolicy", "spec.ingres", []),
        ("Service", "spec.ports.0.port", "http"),
        ("PodDisruptionBudget", "spec.minAvailble", 1),
        ("Ingress", "spec.tls.0.secret", "x"),
        ("HTTPRoute", "spec.rules.0.timeout", {}),
        ("HTTPRoute", "spec.rules.0.timeouts.request", "an hour"),
        ("Gateway", "spec.gatewayClass", "x"),
        ("ExternalSecret", "spec.dataFrom.0.extract.keys", "x"),
    ],
)
def test_a_broken_copy_does_not_fit(kind: str, where: str, value: object) -> None:
    found = [*kustomize(folder("local")), *kustomize(folder(EVERYTHING.name))]
    original = next(entry for entry in found if entry["kind"] == kind)
    assert problems(original) == []
    assert problems(changed(original, where, value))


def changed(original: Object, where: str, value: object) -> Object:
    """A copy with one field set."""
    result = copy.deepcopy(original)
    *path, last = where.split(".")
    node: Any = result
    for part in path:
        node = node[int(part) if part.isdigit() else part]
    node[last] = value
    return result
