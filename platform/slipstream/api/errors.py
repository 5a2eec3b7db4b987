"""The one place where errors become HTTP, in OpenAI's shape: both exception trees, and what the framework raises."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapter_registry import errors as registry
from adapter_registry.imports import ImportEnded
from slipstream import errors as tree
from slipstream.api.observing import note_problem

log = logging.getLogger("slipstream.api")

CLIENT_CLOSED_REQUEST = 499  # nginx's name for "the client went away"; only logs and metrics ever see it
_LONGEST_NAME = 100  # clients choose field names; error bodies stay small


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


@dataclass(frozen=True, slots=True)
class _Rule:
    status: int
    code: str | None = None  # None = the error's own
    message: str | None = None  # None = the error's own sentence, which is written for clients
    retry_after_s: int | None = None


_RULES: Mapping[type[Exception], _Rule] = {
    tree.ClientError: _Rule(400),
    tree.Unauthorized: _Rule(401),
    tree.Forbidden: _Rule(403),
    tree.NotFound: _Rule(404),
    tree.Conflict: _Rule(409),
    tree.PayloadTooLarge: _Rule(413),
    tree.Overloaded: _Rule(429),
    tree.QuotaExceeded: _Rule(429),
    tree.ServerError: _Rule(500),
    tree.AdapterUnavailable: _Rule(503, retry_after_s=2),
    tree.Unavailable: _Rule(503, retry_after_s=2),
    tree.EngineFailed: _Rule(
        503, message="The engine behind this model is being restarted. Try again soon.", retry_after_s=5
    ),
    registry.RegistryError: _Rule(500, "internal_error", "The registry could not do this."),
    registry.InvalidName: _Rule(400, "invalid_name"),
    registry.NotPublished: _Rule(404, "not_found"),
    registry.InUse: _Rule(409, "in_use"),
    ImportEnded: _Rule(409, "import_ended"),
    registry.StorageFull: _Rule(403, "storage_quota_exceeded"),
    registry.StoreUnavailable: _Rule(
        503, "registry_unavailable", "The registry cannot be reached right now. Try again in a few seconds.", 2
    ),
}
KNOWN_ERRORS = (tree.SlipstreamError, registry.RegistryError)


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        # Lone surrogates can arrive through JSON escapes; they must not break the body that refuses them.
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {name: _encodable(value) for name, value in fields.items()}}

    def response(self) -> Response:
        """The whole answer."""
        headers = dict(self.headers) | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return JSONResponse(self.body(), self.status, headers)


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def problem_of(error: Exception, request_id: str) -> Problem:
    """What a client is told about `error`; whatever is not in a tree is a bug, and logged as one."""
    return _noted(_problem_of(error, request_id))


def _noted(problem: Problem) -> Problem:
    """For the access line and the span."""
    note_problem(problem.status, problem.code)
    return problem


def _problem_of(error: Exception, request_id: str) -> Problem:
    rule = next((_RULES[cls] for cls in type(error).__mro__ if cls in _RULES), None)
    if rule is None:
        log.error("request %s failed", request_id, exc_info=error)
        sentence = f"Something went wrong on our side. If it happens again, report it with the request id {request_id}."
        return Problem(500, sentence, "internal_error")
    if rule.status >= 500:
        log.warning("request %s: %s: %s", request_id, type(error).__name__, error)
    return Problem(
        status=504 if getattr(error, "code", None) == "timeout" else rule.status,
        message=rule.message or str(error),
        code=rule.code or getattr(error, "code", None),
        param=getattr(error, "param", None),
        retry_after_s=getattr(error, "retry_after_s", rule.retry_after_s),
        headers=getattr(error, "headers", {}),
    )


def request_id_of(request: Request) -> str:
    """The id that the connection middleware gave this request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def install_handlers(app: FastAPI) -> None:
    """Register every translation."""
    for error in KNOWN_ERRORS:
        app.add_exception_handler(error, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)


async def _known(request: Request, error: Exception) -> Response:
    return problem_of(error, request_id_of(request)).response()


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # FastAPI wraps whatever reading the body raised into a 400; the cause knows better.
    if isinstance(error.__cause__, KNOWN_ERRORS):
        return await _known(request, error.__cause__)
    if isinstance(error.__cause__, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if error.__cause__ is not None:
        sentence = "The body cannot be read as JSON: it must be UTF-8 text of sane depth and numbers."
        return _noted(Problem(400, sentence, "invalid_json")).response()
    path = request.scope.get("path", "")[:_LONGEST_NAME]
    sentences = {
        404: f"There is no route {path}. See /docs for the list.",
        405: f"{request.method[:16]} is not possible on {path}. See /docs for the list.",
    }
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    problem = Problem(error.status_code, sentences.get(error.status_code, str(error.detail)), code)
    response = _noted(problem).response()
    if error.headers and "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _noted(validation_problem(error.errors())).response()


def validation_problem(errors: Sequence[Any]) -> Problem:
    """The first complaint of pydantic, as a sentence that names the field."""
    first = errors[0]
    kind, where, context = first["type"], list(first["loc"]), first.get("ctx") or {}
    if kind == "json_invalid":
        position = where[-1] if where else 0
        return Problem(400, f"The body is not valid JSON (at character {position}).", "invalid_json")
    param = str(context.get("param") or ".".join(str(part) for part in where[1:]))[:_LONGEST_NAME] or None
    if param is None:
        is_json = isinstance(first.get("input"), list | str | int | float)
        hint = "neither a list nor a bare value" if is_json else "sent with 'Content-Type: application/json'"
        return Problem(400, f"The body must be a JSON object, {hint}.", "invalid_request")
    sentences = {
        "missing": f"The field '{param}' is missing.",
        "extra_forbidden": f"Unknown field '{param}': this server does not have it. See /docs for the fields it has.",
        "model_attributes_type": f"'{param}' must be a JSON object.",
        "refused": first["msg"],
    }
    return Problem(400, sentences.get(kind, f"'{param}': {first['msg']}."), "invalid_value", param)


def _encodable(value: str | None) -> str | None:
    return None if value is None else value.encode("utf-8", "replace").decode("utf-8")
