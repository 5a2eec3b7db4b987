"""What a run tells while it goes: data objects, a seam for whoever watches, and the JSON lines that jobs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class Phase:
    """A new part of the run begins."""

    phase: str
    type: Literal["phase"] = "phase"


@dataclass(frozen=True, slots=True)
class Message:
    """Something a person should read."""

    message: str
    level: Literal["info", "warning"] = "info"
    type: Literal["message"] = "message"


@dataclass(frozen=True, slots=True)
class Metrics:
    """Numbers of one optimiser step (`train/loss`, `train/turbo_0_top1` …) or evaluation (`eval/turbo_0_cond` …), under the
    names that trackers show; `total` is None while a time limit decides."""

    step: int
    total: int | None
    progress: float  # share of the run that is done, 0 to 1
    data: Mapping[str, float] = field(default_factory=dict)
    type: Literal["metrics"] = "metrics"


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """The run can go on from here."""

    step: int
    path: str
    data: Mapping[str, float] = field(default_factory=dict)
    type: Literal["checkpoint"] = "checkpoint"


Event = Phase | Message | Metrics | CheckpointSaved


class Observer(Protocol):
    """Whoever watches a run. Called from the training thread; must not raise."""

    def __call__(self, event: Event, /) -> None:
        """One event."""
        ...


class EventLog:
    """An observer that appends JSON lines, one write a line, so that a reader never sees half an event."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self.write(asdict(event))

    def write(self, line: Mapping[str, Any]) -> None:
        """Write any JSON object, such as the result."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


class Fan:
    """An observer that tells several."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def __call__(self, event: Event) -> None:
        """Tell all."""
        for observer in self._observers:
            observer(event)
