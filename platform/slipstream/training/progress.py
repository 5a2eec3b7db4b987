"""What a person at a terminal sees of a run."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slipstream.training.events import CheckpointSaved, Event, Message, Metrics, Phase


class TerminalObserver:
    """A bar with loss, top-1 per stream, tokens/s and time left; on a pipe, a line now and then."""

    def __init__(self, console: Console, every: int = 10) -> None:
        self._console = console
        self._every = every
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("Starting", total=1.0, numbers="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Phase(phase):
                self._progress.reset(self._task, total=1.0, description=phase, numbers="")
                self._line(phase)
            case Message(message, level):
                self._console.print(f"[yellow]Warning:[/] {message}" if level == "warning" else message, soft_wrap=True)
            case Metrics(step, total, progress, data):
                evaluation = _of("eval/", data)
                numbers = describe(evaluation or _of("train/", data))
                self._progress.update(self._task, completed=progress, numbers="" if evaluation else numbers)
                if evaluation:
                    self._console.print(f"step {step}: evaluation  {numbers}", soft_wrap=True)
                elif step % self._every == 0 and data:
                    self._line(f"step {step}{f' of {total}' if total else ''}  {progress:4.0%}  {numbers}")
            case CheckpointSaved(step):
                self._line(f"step {step}: checkpoint saved")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:  # a bar would fill a log file
            self._console.print(text, soft_wrap=True)


def _of(prefix: str, data: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}


def describe(data: Mapping[str, float]) -> str:
    """The numbers that people watch, on one line."""
    parts = [f"loss {data[key]:.3f}" for key in [k for k in ("lora_loss", "loss") if k in data][:1]]
    top1 = [data[f"turbo_{k}_top1"] for k in range(8) if f"turbo_{k}_top1" in data]
    if top1:
        parts.append("top-1 " + "/".join(f"{value:.2f}"[1:] if value < 0.995 else "1" for value in top1))
    if "expected_tokens" in data:
        parts.append(f"{data['expected_tokens']:.2f} tokens/step")
    if "tokens_per_second" in data:
        parts.append(f"{data['tokens_per_second']:.0f} tok/s")
    return "  ".join(parts)
