"""Manifests against schemas, as an API server would check them and stricter: a field that no schema names is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
from support.shared import shared_path

KUBERNETES = "1.34"

_TEXT: dict[str, Any] = {"type": "string"}
_ANNOTATIONS: dict[str, Any] = {"type": "object", "additionalProperties": _TEXT}


def _fields(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_METADATA = _fields("name", "namespace", name=_TEXT, namespace=_TEXT, labels=_ANNOTATIONS, annotations=_ANNOTATIONS)
# Of custom resources whose schemas are not at hand: the fields that our manifests use, after the projects' API references.
_SPECS = {
    "gateway.networking.k8s.io/v1 Gateway": _fields(
        "gatewayClassName",
        "listeners",
        gatewayClassName=_TEXT,
        listeners=_list(
            _fields(
                "name",
                "port",
                "protocol",
                name=_TEXT,
                hostname=_TEXT,
                port=_PORT,
                protocol={"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
                tls=_fields(
                    mode={"enum": ["Terminate", "Passthrough"]},
                    certificateRefs=_list(_fields("name", kind={"const": "Secret"}, name=_TEXT)),
                ),
                allowedRoutes=_fields(namespaces=_fields(**{"from": {"enum": ["All", "Same", "Selector"]}})),
            )
        ),
    ),
    "gateway.networking.k8s.io/v1 HTTPRoute": _fields(
        parentRefs=_list(_fields("name", name=_TEXT, sectionName=_TEXT)),
        hostnames=_list(_TEXT),
        rules=_list(
            _fields(
                matches=_list(
                    _fields(
                        path=_fields(type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value=_TEXT),
                    )
                ),
                timeouts=_fields(request=_DURATION, backendRequest=_DURATION),
                backendRefs=_list(_fields("name", name=_TEXT, port=_PORT)),
            )
        ),
    ),
    "external-secrets.io/v1 ExternalSecret": _fields(
        refreshInterval=_DURATION,
        secretStoreRef=_fields("name", kind={"enum": ["SecretStore", "ClusterSecretStore"]}, name=_TEXT),
        target=_fields(name=_TEXT, creationPolicy={"enum": ["Owner", "Orphan", "Merge", "None"]}),
        dataFrom=_list(_fields(extract=_fields("key", key=_TEXT))),
    ),
}


def problems(found: dict[str, Any]) -> list[str]:
    """What an object's schema says against it."""
    kind = f"{found['apiVersion']} {found['kind']}"
    return [*_against_schema(kind, found), *_twice(found)]


def _twice(found: Any, where: str = "$") -> Iterator[str]:
    """Entries of lists that are maps to an API server (`x-kubernetes-list-type`): it refuses one that is there twice."""
    if isinstance(found, list):
        names = [entry["name"] for entry in found if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        mounts = [entry["mountPath"] for entry in found if isinstance(entry, dict) and "mountPath" in entry]
        for kind, given in (("name", names if not mounts else []), ("mountPath", mounts)):
            yield from (f"{where}: {kind} {each} is there twice" for each in set(given) if given.count(each) > 1)
        for i, entry in enumerate(found):
            yield from _twice(entry, f"{where}[{i}]")
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from _twice(value, f"{where}.{key}")


def _against_schema(kind: str, found: dict[str, Any]) -> list[str]:
    if kind == "ray.io/v1 RayService":
        validator = kuberay()
    elif kind in _SPECS:
        whole = _fields("spec", apiVersion={}, kind={}, metadata=_METADATA, spec=_SPECS[kind])
        validator = jsonschema.Draft202012Validator(whole)
    else:
        return list(_core(found))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(found)]


def _core(found: dict[str, Any]) -> Iterator[str]:
    try:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


@cache
def kuberay() -> jsonschema.protocols.Validator:
    """KubeRay's schema of a RayService. Skips the test where it is not at hand."""
    path = shared_path("kuberay", "rayservices.ray.io_v1.schema.json")
    return jsonschema.Draft202012Validator(_strict(json.loads(path.read_text(encoding="utf-8"))))


def _strict(schema: Any) -> Any:
    """A structural schema as plain JSON Schema that names every field it allows.

    The API server prunes unknown fields silently, fills defaults in before it looks at `required`, and takes numbers
    for quantities; metadata's own schema is not part of a custom resource's.
    """
    if isinstance(schema, list):
        return [_strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict(value) for key, value in schema.items() if key not in ("format", "default", "properties")}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        result["properties"] = {name: _strict(value) for name, value in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
        filled = {name for name, value in properties.items() if "default" in value}
        if "required" in schema:
            result["required"] = [name for name in schema["required"] if name not in filled]
    if schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        return {"anyOf": [{"type": "integer"}, {"type": "string", **pattern}]}
    return result
