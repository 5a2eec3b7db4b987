"""The exception tree of the platform.

    SlipstreamError
    ├── ClientError            the caller can mend it (HTTP 4xx)
    │   ├── InvalidRequest     a field is wrong: `param` names it
    │   ├── ContextOverflow    prompt and answer do not fit the model's context
    │   ├── AdapterRejected    an adapter's files are refused: `code` names the rule
    │   ├── Unauthorized       no key, or a key that is unknown or revoked
    │   ├── Forbidden          a valid key that may not do this
    │   ├── NotFound           unknown, or another tenant's: the two look the same
    │   ├── Conflict           the thing exists already, or is in use
    │   ├── PayloadTooLarge    an upload over its cap
    │   ├── Overloaded         the queue is full: try again after `retry_after_s`
    │   └── QuotaExceeded      the tenant has used what it may: `headers` say what is left
    └── ServerError            ours (HTTP 5xx)
        ├── ConfigError        refused at start-up: a setting is wrong
        ├── ModelUnsupported   refused at start-up: this base model cannot be served
        ├── AdapterUnavailable a published adapter could not be loaded on a replica
        ├── Unavailable        a part we depend on is away (Redis, blobs, a replica)
        └── EngineFailed       the step loop died

Nothing below `slipstream.api` knows HTTP: `slipstream/api/errors.py` is the only file that turns these into responses.
Messages are sentences for the person at the other end; they never carry internals.
"""

from __future__ import annotations


class SlipstreamError(Exception):
    """Root of the tree. `code` is a stable machine-readable name; `str(error)` is the sentence for people."""

    code = "internal_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders (Ray); keyword-only arguments need a state to survive pickling.
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(cls: type[SlipstreamError], state: dict[str, object]) -> SlipstreamError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class ClientError(SlipstreamError):
    """The caller can mend it."""

    code = "invalid_request"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param


class InvalidRequest(ClientError):
    """A field of the request is wrong; `param` names it."""


class ContextOverflow(ClientError):
    """Prompt plus answer do not fit the model's context window."""

    code = "context_length_exceeded"


class AdapterRejected(ClientError):
    """An adapter's files break a rule; `code` names the rule, the message says what to do."""

    code = "adapter_rejected"


class Unauthorized(ClientError):
    """No key, or one that is unknown or revoked."""

    code = "invalid_api_key"


class Forbidden(ClientError):
    """A valid key that may not do this."""

    code = "forbidden"


class NotFound(ClientError):
    """Unknown, or another tenant's: on purpose the two look the same."""

    code = "not_found"


class Conflict(ClientError):
    """It exists already, or is in use."""

    code = "conflict"


class PayloadTooLarge(ClientError):
    """The upload is over its cap."""

    code = "payload_too_large"


class Overloaded(ClientError):
    """A bounded queue is full."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(ClientError):
    """The tenant has used what it may for now."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, code: str, retry_after_s: int, headers: dict[str, str]) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s
        self.headers = headers


class ServerError(SlipstreamError):
    """Ours to mend."""


class ConfigError(ServerError):
    """A setting is wrong; refused at start-up."""

    code = "config_error"


class ModelUnsupported(ServerError):
    """This base model cannot be served; refused at start-up."""

    code = "model_unsupported"


class AdapterUnavailable(ServerError):
    """A published adapter could not be loaded on this replica."""

    code = "adapter_unavailable"


class Unavailable(ServerError):
    """A part we depend on is away."""

    code = "unavailable"


class EngineFailed(ServerError):
    """The step loop died; the replica is being replaced."""

    code = "engine_failed"
