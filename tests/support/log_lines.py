"""Log records as a host's handler gets them, with what a plain formatter makes of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from slipstream.telemetry.logs import RequestContext


class KeptLines(logging.Handler):
    """Keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.lines.append(self.format(record))

    def told(self) -> str:
        """Everything that any of them says, in its line or in a field."""
        fields = [str({**record.__dict__, "exc_info": None}) for record in self.records]
        return "\n".join([*self.lines, *fields])


@contextmanager
def kept_lines(logger: str) -> Iterator[KeptLines]:
    """What is logged beneath `logger` meanwhile, at every level and with its request's context."""
    found, kept = logging.getLogger(logger), KeptLines()
    context = RequestContext(as_text=False)
    kept.addFilter(context)
    found.addFilter(context)  # before other handlers, which would write an error's text down for all
    level = found.level
    found.setLevel(logging.DEBUG)
    found.addHandler(kept)
    try:
        yield kept
    finally:
        found.removeHandler(kept)
        found.removeFilter(context)
        found.setLevel(level)
