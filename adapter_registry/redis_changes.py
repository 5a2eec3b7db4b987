"""`RedisChanges`: changes in one Redis stream, for all tenants."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from pydantic import ValidationError

from adapter_registry.changes import CHANGES_KEPT, Change, ChangeFeed
from adapter_registry.redis_connection import RedisConnection
from adapter_registry.scripts import CHANGES_KEY

_LONGEST_WAIT_S = 1.0  # of one command: well below the time after which a silent server is given up


class RedisChanges(RedisConnection, ChangeFeed):
    """Build it with `from_url`; one instance serves one event loop."""

    async def tell(self, change: Change) -> None:
        """Tell everybody who listens."""
        await self._command(*told(change))

    async def now(self) -> str:
        """A place to listen from: behind all that was told."""
        last = await self._command("XREVRANGE", CHANGES_KEY, "+", "-", "COUNT", "1")
        return str(last[0][0]) if last else "0-0"

    async def listen(self, after: str, wait_s: float) -> tuple[Sequence[Change], str]:
        """What was told after a place, and the place after that; waits up to `wait_s` for the first."""
        wait_ms = max(1, round(min(wait_s, _LONGEST_WAIT_S) * 1000))
        found = await self._command("XREAD", "COUNT", "100", "BLOCK", str(wait_ms), "STREAMS", CHANGES_KEY, after)
        entries = _entries(found)
        changes = []
        for _, fields in entries:
            with suppress(ValidationError, KeyError):  # of a newer gateway's, that we know nothing about
                changes.append(Change.model_validate_json(fields["change"]))
        return changes, str(entries[-1][0]) if entries else after


def told(change: Change) -> tuple[str, ...]:
    """The command that tells."""
    text = change.model_dump_json(exclude_none=True)
    return ("XADD", CHANGES_KEY, "MAXLEN", "~", str(CHANGES_KEPT), "*", "change", text)


def _entries(found: object) -> Sequence[tuple[str, dict[str, str]]]:
    """Of the one stream; redis-py gives a list of streams, or a dictionary of lists of pages."""
    if isinstance(found, dict):
        return [entry for pages in found.values() for page in pages for entry in page]
    return list(found[0][1]) if isinstance(found, list) and found else []
