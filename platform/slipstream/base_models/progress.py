"""How long work tells a person about itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]  # called with the bytes done so far


class Progress(Protocol):
    """Shows one phase at a time; `slipstream.cli` has the terminal's, `Silent` shows nothing."""

    def phase(self, title: str, total_bytes: int | None = None) -> AbstractContextManager[Advance]:
        """A phase, entered and left; `total_bytes` is None when its length is unknown."""
        ...


def _ignore(done: int) -> None:
    """Nobody is watching."""


class Silent:
    """Shows nothing."""

    def phase(self, title: str, total_bytes: int | None = None) -> AbstractContextManager[Advance]:
        """A phase that nobody sees."""
        return nullcontext(_ignore)
