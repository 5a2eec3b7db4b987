"""How far a run is, and what depends on it: learning rates and the gate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Progress by steps or by minutes, whichever ends first. With a time limit the schedules are stretched to end with it;
    without one they depend on the step alone, so a seed repeats."""

    total_steps: int
    max_seconds: float | None = None
    step: int = 0
    seconds_before: float = 0.0  # trained before this process: a resumed run keeps its time limit
    now: Callable[[], float] = time.monotonic
    agreed: float | None = None  # `seconds` after the last step as several workers agreed on it
    _began: float = field(default=0.0, init=False)

    def start(self) -> None:
        """The first step begins."""
        self._began = self.now()

    @property
    def seconds(self) -> float:
        """Time trained so far, in this process and before."""
        return self.seconds_before + (self.now() - self._began if self._began else 0.0)

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the end."""
        by_steps = self.step / max(1, self.total_steps)
        return min(1.0, max(by_steps, self._by_time))

    @property
    def is_over(self) -> bool:
        """Whether the time limit has been reached."""
        return self._by_time >= 1.0

    @property
    def _by_time(self) -> float:
        seconds = self.seconds if self.agreed is None else self.agreed
        return seconds / self.max_seconds if self.max_seconds else 0.0


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1e-9, 1 - warmup)))


def gate_value(progress: float, warmup: float, peak: float) -> float:
    """0 while the streams are still learning, then half a sine up to `peak` (methods.md 1.3, after Medusa-2's warm-up)."""
    if progress < warmup or peak == 0:
        return 0.0
    return peak * math.sin(0.5 * math.pi * (progress - warmup) / max(1e-9, 1 - warmup))
