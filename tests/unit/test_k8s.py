"""The manifests, as an API server would check them and stricter: a field that no schema names is refused here."""

from __future__ import annotations

import ast
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic.warnings import PydanticDeprecatedSince20
from support.shared import shared_path

from slipstream.config import ModelSettings, Settings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", category=PydanticDeprecatedSince20)  # Ray 2.60's own models
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        RayActorOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
    )

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "k8s" / "base"
KUBERNETES = "1.34"
PROXY_HOOK = {"name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "value": "deployments.proxy:middlewares"}
MANIFESTS = sorted([*BASE.glob("*.yaml"), *(ROOT / "k8s" / "examples").glob("*.yaml")])


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def rayservice() -> dict[str, Any]:
    (document,) = documents(BASE / "rayservice.yaml")
    return document


def serve_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(rayservice()["spec"]["serveConfigV2"])
    return config


def strict(schema: Any) -> Any:
    """A structural schema as plain JSON Schema that names every field it allows.

    The API server prunes unknown fields silently, fills defaults in before it looks at `required`, and takes numbers
    for quantities; metadata's own schema is not part of a custom resource's.
    """
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items() if key not in ("format", "default", "properties")}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        result["properties"] = {name: strict(value) for name, value in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
        filled = {name for name, value in properties.items() if "default" in value}
        if "required" in schema:
            result["required"] = [name for name in schema["required"] if name not in filled]
    if schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        return {"anyOf": [{"type": "integer"}, {"type": "string", **pattern}]}
    return result


@pytest.fixture(scope="module")
def rayservice_validator() -> jsonschema.protocols.Validator:
    path = shared_path("kuberay", "rayservices.ray.io_v1.schema.json")
    return jsonschema.Draft202012Validator(strict(json.loads(path.read_text())))


def test_rayservice_fits_kuberays_schema(rayservice_validator: jsonschema.protocols.Validator) -> None:
    errors = [f"{error.json_path}: {error.message}" for error in rayservice_validator.iter_errors(rayservice())]
    assert errors == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("serveConfig", "x"),
        ("rayClusterConfig.headGroupSpec.template.spec.containers.0.imagePullPolice", "Always"),
        ("rayClusterConfig.workerGroupSpecs.0.minReplicas", "one"),
        ("rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory", "8 GB"),
    ],
)
def test_the_schema_check_finds_mistakes(
    where: str, value: object, rayservice_validator: jsonschema.protocols.Validator
) -> None:
    broken = copy.deepcopy(rayservice())
    *path, last = where.split(".")
    node: Any = broken["spec"]
    for part in path:
        node = node[int(part) if part.isdigit() else part]
    node[last] = value
    assert list(rayservice_validator.iter_errors(broken))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_core_kinds_fit_kubernetes(path: Path) -> None:
    for document in documents(path):
        if document["apiVersion"].startswith(("ray.io/", "kustomize.")):
            continue
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    assert documents(path)


def test_kustomization_lists_what_is_there() -> None:
    (kustomization,) = documents(BASE / "kustomization.yaml")
    assert set(kustomization) == {"apiVersion", "kind", "namespace", "resources"}
    assert sorted(kustomization["resources"]) == sorted(
        p.name for p in BASE.glob("*.yaml") if p.stem != "kustomization"
    )
    for name in kustomization["resources"]:
        for document in documents(BASE / name):
            assert document["kind"] != "Secret", "the base applies no secret"
            assert document["metadata"].get("namespace", document["metadata"]["name"]) == kustomization["namespace"]


def unknown_keys(value: dict[str, Any], model: Any, where: str) -> Iterator[str]:
    """Serve takes unknown keys silently, for the sake of newer versions; a misspelt one would do nothing."""
    yield from (f"{where}.{key}" for key in value if key not in model.model_fields)


def test_serve_config_fits_rays_schema_and_has_no_unknown_key() -> None:
    config = serve_config()
    ServeDeploySchema.model_validate(config)
    found = list(unknown_keys(config, ServeDeploySchema, "serve"))
    found += unknown_keys(config["http_options"], HTTPOptionsSchema, "http_options")
    for application in config["applications"]:
        found += unknown_keys(application, ServeApplicationSchema, application["name"])
        for deployment in application["deployments"]:
            name = deployment["name"]
            found += unknown_keys(deployment, DeploymentSchema, name)
            found += unknown_keys(deployment.get("ray_actor_options", {}), RayActorOptionsSchema, name)
            found += unknown_keys(deployment["autoscaling_config"], AutoscalingConfig, name)
            AutoscalingConfig.model_validate(deployment["autoscaling_config"])
    assert found == []


def application() -> dict[str, Any]:
    (only,) = serve_config()["applications"]
    result: dict[str, Any] = only
    return result


def models() -> list[ModelSettings]:
    return [ModelSettings.model_validate(model) for model in application()["args"]["models"]]


def test_names_and_import_path_are_the_contracts() -> None:
    found = application()
    assert (found["name"], found["route_prefix"]) == ("slipstream", "/")
    assert [deployment["name"] for deployment in found["deployments"]] == ["Gateway"]
    assert [model.slug for model in models()] == ["smollm2-135m-instruct"]


def test_the_import_path_is_a_function_and_takes_these_args() -> None:
    module, _, function = application()["import_path"].partition(":")
    assert (module, function) == ("deployments.app", "build")
    tree = ast.parse((ROOT / "deployments" / "app.py").read_text())  # read, not imported: that would start torch
    (builder,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    annotation = builder.args.args[0].annotation
    assert isinstance(annotation, ast.Name)
    assert annotation.id == "AppArgs"
    assert set(application()["args"]) <= set(Settings.model_fields)


def test_autoscaling_is_bounded_and_fits_the_cluster() -> None:
    (workers,) = rayservice()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert 1 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for deployment in application()["deployments"]:
        scaling = deployment["autoscaling_config"]
        assert 1 <= scaling["min_replicas"] <= scaling["max_replicas"] <= workers["maxReplicas"]
        assert deployment["num_replicas"] == "auto", "the code sets a fixed number, which this takes back"
    for model in models():
        assert 1 <= model.min_replicas < model.most_replicas <= workers["maxReplicas"]


def test_draining_fits_into_the_grace_periods() -> None:
    spec = rayservice()["spec"]
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    drains = [application()["args"][name] for name in ("drain_s", "gateway_drain_s")]
    assert drains[0] < drains[1], "a gateway's requests may wait for an engine"
    assert not any("graceful_shutdown_timeout_s" in deployment for deployment in application()["deployments"])
    for drain in drains:
        assert drain < workers["template"]["spec"]["terminationGracePeriodSeconds"]
        assert drain < spec["rayClusterDeletionDelaySeconds"]


def pods() -> list[dict[str, Any]]:
    cluster = rayservice()["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def test_no_pod_runs_as_root() -> None:
    contexts = [container["securityContext"] for pod in pods() for container in pod["spec"]["containers"]]
    contexts.append(rayservice()["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_secrets_come_from_the_secret_only() -> None:
    (secret,) = documents(ROOT / "k8s" / "examples" / "secret.yaml")
    for pod in pods():
        for container in pod["spec"]["containers"]:
            names = {variable["name"] for variable in container["env"]}
            assert {"SLIPSTREAM_REDIS_URL", "SLIPSTREAM_ADMIN_KEY"} <= names
            assert PROXY_HOOK in container["env"]
            for variable in container["env"]:
                if variable == PROXY_HOOK:
                    continue
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["name"] == secret["metadata"]["name"]
                assert reference["key"] in secret["stringData"]


def test_the_head_runs_no_replicas_and_the_policy_selects_every_pod() -> None:
    assert rayservice()["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (policy,) = documents(BASE / "networkpolicy.yaml")
    wanted = policy["spec"]["podSelector"]["matchLabels"]
    for pod in pods():
        assert wanted.items() <= pod["metadata"]["labels"].items()
        assert "restartPolicy" not in pod["spec"], "autoscaler v2 wants it unset"
