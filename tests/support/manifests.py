"""What `k8s/` builds to, and what of it is generated: `make manifests` runs this file to write it anew."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from support.kube_tools import ROOT, helm, kubectl, run

K8S = ROOT / "k8s"
CHART = K8S / "helm" / "slipstream"
SNAPSHOTS = ROOT / "tests" / "k8s" / "snapshots"
OVERLAYS = ("local", "gpu-single", "gpu-tp", "ha")
EVERYTHING = ROOT / "tests" / "k8s" / "everything"  # an overlay of the components that no other one has
RAYSERVICE = "slipstream"
Object = dict[str, Any]


def folder(overlay: str) -> Path:
    """Where an overlay lies."""
    return EVERYTHING if overlay == EVERYTHING.name else K8S / "overlays" / overlay


@cache
def _kustomize(path: Path) -> str:
    return run(kubectl(), "kustomize", path).stdout


def kustomize(path: Path) -> list[Object]:
    """The objects of a kustomization."""
    return objects(_kustomize(path))


def values(overlay: str) -> list[str | Path]:
    """The options that give the chart an overlay's values."""
    files = ["ha", overlay] if overlay == EVERYTHING.name else [overlay]
    return [f"--values={CHART / 'overlays' / file}.yaml" for file in files]


def template(*given: str | Path, chart: Path = CHART) -> list[Object]:
    """The objects of the chart with values, given as helm's options."""
    return objects(run(helm(), "template", RAYSERVICE, chart, "--namespace=slipstream", *given).stdout)


def comparable(found: list[Object]) -> dict[str, Object]:
    """By kind and name, with the Serve config read. Without the namespace, which helm makes itself."""
    result = {name(entry): copy.deepcopy(entry) for entry in found if entry["kind"] != "Namespace"}
    for entry in result.values():
        if entry["kind"] == "RayService":
            entry["spec"]["serveConfigV2"] = yaml.safe_load(entry["spec"]["serveConfigV2"])
    return result


def objects(text: str) -> list[Object]:
    """The objects of a stream of YAML documents."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def name(found: Object) -> str:
    """Kind and name."""
    return f"{found['kind']}/{found['metadata']['name']}"


def rayservice(found: list[Object]) -> Object:
    """The one RayService."""
    (only,) = [entry for entry in found if entry["kind"] == "RayService"]
    return only


def pods(service: Object) -> Iterator[Object]:
    """The pods that KubeRay makes of a RayService, with the containers that it adds, as far as they can be known here.

    After `DefaultHeadPodTemplate` and `DefaultWorkerPodTemplate` of KubeRay 1.7.
    """
    cluster = service["spec"]["rayClusterConfig"]
    head = _pod(cluster["headGroupSpec"]["template"], "head")
    options = cluster["autoscalerOptions"]
    autoscaler = {"name": "autoscaler", "image": head["spec"]["containers"][0]["image"]}
    own = ("resources", "securityContext", "volumeMounts")
    autoscaler |= {"imagePullPolicy": "IfNotPresent"} | {key: options[key] for key in own}
    head["spec"]["containers"].append(autoscaler)
    yield head
    for group in cluster["workerGroupSpecs"]:
        pod = _pod(group["template"], group["groupName"])
        ray = pod["spec"]["containers"][0]
        waits = {"cpu": "200m", "memory": "256Mi"}
        kept = ("image", "imagePullPolicy", "securityContext", "env", "volumeMounts")
        wait = {"name": "wait-gcs-ready", "resources": {"requests": waits, "limits": waits}}
        pod["spec"]["initContainers"] = [wait | {key: copy.deepcopy(ray[key]) for key in kept}]
        yield pod


def _pod(pod_template: Object, what: str) -> Object:
    pod = copy.deepcopy(pod_template)
    health: Object = {"httpGet": {"path": "/api/healthz", "port": 52365}}  # KubeRay's own, in every Ray container
    pod["spec"]["containers"][0] |= {"livenessProbe": health, "readinessProbe": health}
    pod["spec"]["restartPolicy"] = "Never"
    metadata = pod["metadata"] | {"name": f"slipstream-{what}", "namespace": "slipstream"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}


def serve_config(overlay: str) -> str:
    """What `slipstream config --rayservice` prints of an overlay's settings."""
    from deployments.app import rayservice_patch  # noqa: PLC0415 - with it comes Ray
    from slipstream.config import load_settings  # noqa: PLC0415

    kept = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("SLIPSTREAM_") or key == "PORT"}
    os.environ["SLIPSTREAM_CONFIG"] = str(folder(overlay) / "slipstream.yaml")
    try:
        return rayservice_patch(load_settings(), RAYSERVICE)
    finally:
        del os.environ["SLIPSTREAM_CONFIG"]
        os.environ.update(kept)


def values_schema() -> str:
    """The chart's `values.schema.json`: what is written by hand, with the settings that the command line knows."""
    from deployments.app import AppArgs  # noqa: PLC0415
    from slipstream.config import Settings  # noqa: PLC0415

    schema: Object = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    whole = Settings.model_json_schema()
    model = whole["$defs"]["ModelSettings"]
    taken = {*AppArgs.model_fields, "host", "port"}
    described = {key: _plain(value) for key, value in whole["properties"].items() if key in taken - {"models"}}
    models = {"type": "array", "items": {"$ref": "#/$defs/model"}}
    described["port"] |= {"const": 8000, "description": "What ports, policies and routes of the chart say."}
    settings = {"type": "object", "additionalProperties": False, "required": ["home", "host"]}
    schema["properties"]["settings"] = settings | {"properties": described | {"models": models}}
    schema["$defs"]["model"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {key: _plain(value) for key, value in model["properties"].items()},
    }
    schema["$defs"] |= {key: value for key, value in whole["$defs"].items() if key != "ModelSettings"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _plain(schema: Object) -> Object:
    """Without what only repeats the field's name, and without defaults: an unset value stays unset."""
    return {key: value for key, value in schema.items() if key not in ("title", "default")}


def snapshot(overlay: str) -> str:
    """What an overlay builds to."""
    return _kustomize(folder(overlay))


def main() -> None:
    """Write everything that is generated."""
    for overlay in OVERLAYS:
        (folder(overlay) / "serve-config.yaml").write_text(serve_config(overlay), encoding="utf-8")
    (CHART / "values.schema.json").write_text(values_schema(), encoding="utf-8")
    SNAPSHOTS.mkdir(parents=True, exist_ok=True)
    for overlay in (*OVERLAYS, EVERYTHING.name):
        (SNAPSHOTS / f"{overlay}.yaml").write_text(snapshot(overlay), encoding="utf-8")


if __name__ == "__main__":
    main()
