"""What scheduler and residency manager say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AdapterLease:
    """A resident adapter, pinned for one sequence."""

    slot: int
    num_streams: int


class AdapterSlots(Protocol):
    """What the scheduler needs of the residency manager."""

    def try_pin(self, digest: str) -> AdapterLease | None:
        """Pin the adapter on the device for one more sequence, or None when it is not there (yet)."""
        ...

    def unpin(self, digest: str) -> None:
        """Undo one `try_pin`."""
        ...
