"""From an error response back to the exception tree."""

from __future__ import annotations

from typing import Any

import httpx

from slipstream import errors as tree

_CLIENT_ERRORS: dict[int, type[tree.ClientError]] = {
    401: tree.Unauthorized,
    403: tree.Forbidden,
    404: tree.NotFound,
    409: tree.Conflict,
    413: tree.PayloadTooLarge,
}


def error_of(response: httpx.Response) -> tree.SlipstreamError:
    """The error that an answer of 400 or more stands for, with the server's own sentence."""
    details = _details(response)
    message = str(details.get("message") or f"The server answered with status {response.status_code}.")
    code, status = details.get("code"), response.status_code
    if status >= 500:
        kind = tree.Unavailable if status in (502, 503, 504) else tree.ServerError
        return kind(_with_request_id(message, response), code=code)
    if status == 429:
        return tree.Overloaded(message, retry_after_s=_retry_after_s(response))
    return _CLIENT_ERRORS.get(status, tree.InvalidRequest)(message, code=code, param=details.get("param"))


def _details(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:  # a proxy's page, not ours
        return {}
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}


def _retry_after_s(response: httpx.Response) -> int:
    value = response.headers.get("retry-after", "")
    return int(value) if value.isascii() and value.isdigit() else 1


def _with_request_id(message: str, response: httpx.Response) -> str:
    request_id = response.headers.get("x-request-id", "")
    return message if not request_id or request_id in message else f"{message} (request id {request_id})"
