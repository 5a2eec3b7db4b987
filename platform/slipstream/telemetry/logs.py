"""Log lines that say whose request they are about, and that hold neither keys nor, unless a tenant wants it, prompts.

Handlers and formatters are the host's, Ray Serve's for one: a line's context is in the record's attributes, which a JSON
formatter writes as fields; for text it is put behind the message.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator, Sequence

from adapter_registry.errors import RegistryError
from adapter_registry.keys import SECRET_PREFIX
from slipstream.errors import SlipstreamError
from slipstream.telemetry.exchange import CURRENT, Exchange

OURS = ("slipstream", "adapter_registry", "deployments")
MAX_TEXT_CHARS = 8192  # of a prompt or an answer in one line
_MAX_CHAIN = 8  # exceptions that led to one another
_SECRETS = re.compile(
    rf"(?i)(\bbearer\s+)[^\s'\",;]+|{re.escape(SECRET_PREFIX)}[\w-]{{8,}}|(://[^/\s:@]*:)[^@\s/]+(?=@)"
)
_SHOWN = "_context_shown"
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", _SHOWN}
SHOWS_ERROR = "shows_error"  # in a record's `extra`: what its error says has nothing to do with what was asked


class RequestContext(logging.Filter):
    """Puts into each record what is known of its request, and takes out what no log may hold."""

    def __init__(self, as_text: bool) -> None:
        """`as_text`: for formatters that show a record's message and nothing else."""
        super().__init__()
        self._as_text = as_text

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True. Safe to pass twice."""
        exchange = CURRENT.get()
        if exchange is not None:
            for name, value in exchange.context().items():
                record.__dict__.setdefault(name, value)
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not record.exc_text:
            shown = record.__dict__.pop(SHOWS_ERROR, False) or not _may_quote(exchange, record)
            record.exc_text = redacted("".join(traceback.format_exception(error)) if shown else withheld(error))
        for name, value in record.__dict__.items():
            if isinstance(value, str) and name not in _STANDARD:
                record.__dict__[name] = redacted(value)
        message = record.getMessage()
        if record.name == "asyncio":  # what a task was doing when nobody looked: its error is in the message as well
            message = message.partition("\n")[0]
        if self._as_text and not record.__dict__.get(_SHOWN):
            given = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
            fields = {name: value for name, value in given.items() if not name.startswith("_")}  # those are Ray's own
            message = " ".join([message, *(f"{name}={_word(value)}" for name, value in fields.items())])
            record.__dict__[_SHOWN] = True
        record.msg, record.args = redacted(message), ()
        return True


def _may_quote(exchange: Exchange | None, record: logging.LogRecord) -> bool:
    """Whether an error may have somebody's prompt in what it says."""
    return not exchange.log_prompts if exchange is not None else record.name == "asyncio"


def _word(value: object) -> str:
    """One word, whatever is in it: nobody forges a line."""
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)


class Forward(logging.Handler):
    """Hands records to another logger, whatever its handlers are by then."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self._target = logging.getLogger(target)

    def emit(self, record: logging.LogRecord) -> None:
        """Its level was checked where it was logged."""
        self._target.handle(record)


def forward_logs(target: str, level: str, as_text: bool) -> None:
    """Have what this process logs leave through the handlers of `target`, with its request's context."""
    host = logging.getLogger(target)
    for old in [each for each in host.filters if isinstance(each, RequestContext)]:
        host.removeFilter(old)
    host.addFilter(RequestContext(as_text))
    for name, least in (*((each, level) for each in OURS), ("opentelemetry", "ERROR"), ("asyncio", "WARNING")):
        logger = logging.getLogger(name)
        logger.setLevel(least)
        logger.propagate = False
        logger.handlers = [Forward(target)]


def redacted(text: str) -> str:
    """Without keys, credentials of headers and passwords in URLs."""
    return _SECRETS.sub(lambda found: f"{found[1] or found[2] or ''}[redacted]", text)


def withheld(error: BaseException) -> str:
    """The traceback without what the exceptions say, which may quote a request; our own are sentences that do not."""
    parts = []
    for each in reversed(list(_chain(error))):
        said = f": {each}" if isinstance(each, SlipstreamError | RegistryError) else " (what it says is withheld)"
        kind = f"{type(each).__module__}.{type(each).__qualname__}"
        parts.append(
            "".join(["Traceback (most recent call last):\n", *traceback.format_tb(each.__traceback__), kind, said])
        )
    return "\nwhich led to\n".join(parts)


def _chain(error: BaseException) -> Iterator[BaseException]:
    now: BaseException | None = error
    for _ in range(_MAX_CHAIN):
        if now is None:
            return
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)


def shortened(texts: Sequence[str]) -> str:
    """Texts as one, of bounded length."""
    text = "\n".join(texts)
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]}… ({len(text)} characters)"
