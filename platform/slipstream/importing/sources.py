"""The seam to where somebody else keeps adapters. Real twin: `deployments.remote_sources.RemoteSources`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

Progress = Callable[[int], None]  # bytes so far


class Sources(Protocol):
    """Brings adapters here."""

    def check(self, url: str) -> None:
        """Raise `InvalidRequest` for what may not be pulled."""
        ...

    async def fetch(self, url: str, folder: Path, max_bytes: int, progress: Progress) -> str:
        """Put the files at `url` into an empty folder; returns the URL of exactly what came.

        Raises `AdapterRejected` for what cannot be an adapter's folder, `InvalidRequest` for what is not there or not for
        us, and `Unavailable` for what may work later.
        """
        ...
