"""What a person sees while Slipstream starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from slipstream.base_models.progress import Advance


def _unseen(done: int) -> None:
    """A log file gets no bar."""


class TerminalProgress:
    """One line a phase: a bar while it runs on a terminal, and how long it took when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def phase(self, title: str, total_bytes: int | None = None) -> Iterator[Advance]:
        """Show a phase while the body runs."""
        started = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(f"  {title} …", highlight=False, soft_wrap=True)
            yield _unseen
            return
        columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
        if total_bytes is not None:
            columns[2:2] = [DownloadColumn(), TaskProgressColumn()]
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(title, total=total_bytes)

            def advance(done: int) -> None:
                bar.update(task, completed=done)

            yield advance
        self._console.print(f"  {title} … {time.monotonic() - started:.1f} s", highlight=False, soft_wrap=True)
