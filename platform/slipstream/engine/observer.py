"""Who is told what the engine does, to count it: plain calls, no metrics library here. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class AdapterMove(StrEnum):
    """What happened to an adapter on this replica."""

    LOADED = "loaded"  # host → device
    LOAD_FAILED = "load_failed"  # the device had no room
    EVICTED = "evicted"  # device → host
    DROPPED = "dropped"  # host → nowhere


class FetchOutcome(StrEnum):
    """How a fetch to the host ended."""

    OK = "ok"
    FAILED = "failed"
    LATE = "late"  # given up


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One step that computed something."""

    sequences: int
    tokens: int  # rows
    budget: int  # rows that there might have been
    seconds: float  # of the model's part


class EngineObserver(Protocol):
    """Called by the step thread, `fetched` by the event loop. Must be quick: everybody's tokens wait for it."""

    def stepped(self, facts: StepFacts) -> None:
        """After each step."""
        ...

    def started(self, adapter: str | None, waited_s: float) -> None:
        """A sequence's first step is planned; it came `waited_s` ago."""
        ...

    def judged(self, adapter: str, judged: int, accepted: int) -> None:
        """Of a sequence's drafts in this step the first `judged` were compared with a token, the first `accepted` were
        right."""
        ...

    def moved(self, move: AdapterMove) -> None:
        """An adapter came or went."""
        ...

    def fetched(self, outcome: FetchOutcome, seconds: float) -> None:
        """A fetch has ended."""
        ...


class Unobserved(EngineObserver):
    """Nobody looks."""

    def stepped(self, facts: StepFacts) -> None:
        """Nothing."""

    def started(self, adapter: str | None, waited_s: float) -> None:
        """Nothing."""

    def judged(self, adapter: str, judged: int, accepted: int) -> None:
        """Nothing."""

    def moved(self, move: AdapterMove) -> None:
        """Nothing."""

    def fetched(self, outcome: FetchOutcome, seconds: float) -> None:
        """Nothing."""
