"""What changed, for replicas: a version that will be asked for soon, one that is gone. A hint, never the truth.

Real twin: `adapter_registry.redis_changes.RedisChanges`. Public fake: `slipstream.testing.MemoryChanges`. Both run the same
suite in `tests/contract`. A change that is missed costs a fetch at the first request, or memory until it is needed: so they
are told after the step that made them, are not waited for, and only the last `CHANGES_KEPT` are there to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from adapter_registry.records import Digest, Frozen, Name

CHANGES_KEPT = 10_000


class Change(Frozen):
    """Of one tenant's digests: `coming` takes over from `instead_of`, or `gone` was deleted."""

    tenant: Name
    coming: Digest | None = None
    instead_of: Digest | None = None
    gone: Digest | None = None


class ChangeFeed(Protocol):
    """All tenants' changes, in order."""

    async def tell(self, change: Change) -> None:
        """Tell everybody who listens."""
        ...

    async def now(self) -> str:
        """A place to listen from: behind all that was told."""
        ...

    async def listen(self, after: str, wait_s: float) -> tuple[Sequence[Change], str]:
        """What was told after a place, and the place after that; waits up to `wait_s` for the first."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...
