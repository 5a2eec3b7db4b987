"""What a person sees while a job runs: one line of metrics that changes, and the messages above it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Json = dict[str, Any]
_SHOWN = 5  # metrics on the line


class TrainingDisplay:
    """Writes to standard error, so that a script's output stays its own; a log file gets lines without a bar."""

    def __init__(self, enabled: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._enabled = enabled
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not enabled)
        self._task = self._bar.add_task("queued", total=None, told="")
        self._shown: AbstractContextManager[object] = self._bar if self._console.is_terminal else nullcontext()

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._shown.__exit__(*details)

    def event(self, event: Json) -> None:
        """One event of the job's log."""
        if not self._enabled:
            return
        if event["type"] == "metrics" and self._console.is_terminal:
            data = dict(event["data"] or {})
            step, total = data.pop("step", None), data.pop("total", None)
            told = "  ".join(f"{name} {value:.3g}" for name, value in list(data.items())[:_SHOWN])
            self._bar.update(self._task, completed=step, total=total, told=told)
            return
        self._console.print(event["message"], markup=False, soft_wrap=True)

    def job(self, job: Json) -> None:
        """The job as it stands."""
        self._bar.update(self._task, description=str(job["status"]))
