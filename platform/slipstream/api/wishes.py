"""What a publisher says of a new version beside its files, as fields of a form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from adapter_registry.imports import SmokePrompt
from adapter_registry.records import VersionWish
from slipstream.errors import InvalidRequest

SmokePrompts = Annotated[tuple[SmokePrompt, ...], Field(max_length=8)]
_SMOKE: TypeAdapter[tuple[SmokePrompt, ...]] = TypeAdapter(SmokePrompts)


def wish_of(fields: Mapping[str, str]) -> VersionWish:
    """Policy, labels and lineage. A version that exists already keeps its own. Raises `InvalidRequest`."""
    asked = fields.get("speculation", "on")
    if asked not in ("on", "off"):
        raise InvalidRequest(f"'speculation' is 'on' or 'off', not '{asked[:80]}'.", param="speculation")
    wish: dict[str, Any] = {name: _parsed(fields, name) for name in ("labels", "lineage") if name in fields}
    wish["speculation"] = {"enabled": asked == "on", "reason": fields.get("speculation_reason", "")}
    try:
        return VersionWish.model_validate(wish)
    except ValidationError as error:
        raise _refusal(error, {"speculation.reason": "speculation_reason"}) from None


def smoke_of(fields: Mapping[str, str]) -> tuple[SmokePrompt, ...]:
    """Prompts that it must answer. Raises `InvalidRequest`."""
    if "smoke" not in fields:
        return ()
    try:
        return _SMOKE.validate_python(_parsed(fields, "smoke"))
    except ValidationError as error:
        raise _refusal(error, {}, "smoke.") from None


def _parsed(fields: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(fields[name])
    except (ValueError, RecursionError):
        raise InvalidRequest(f"'{name}' is not JSON.", code="invalid_value", param=name) from None


def _refusal(error: ValidationError, names: Mapping[str, str], prefix: str = "") -> InvalidRequest:
    problem = error.errors(include_url=False)[0]
    place = (prefix + ".".join(map(str, problem["loc"]))).rstrip(".")
    param = names.get(place, place)
    return InvalidRequest(f"'{param[:200]}' is wrong: {problem['msg']}.", code="invalid_value", param=param[:200])
