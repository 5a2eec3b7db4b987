"""One server for all end-to-end tests that do not stop it."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import free_port
from support.serving import Running, serving, slipstream, stop
from support.shared import shared_path

ADAPTERS = {"snips": "snips-turbo", "wikisql": "wikisql-turbo"}


@pytest.fixture(scope="package")
def server() -> Iterator[Running]:
    """A running server."""
    with (
        tempfile.TemporaryDirectory(prefix="slip-e2e-") as folder,
        serving(Path(folder) / "home", free_port(), SLIPSTREAM_WEBHOOK_PRIVATE_HOSTS='["127.0.0.1"]') as running,
    ):
        yield running
        assert stop(running, signal.SIGINT) == 0


@pytest.fixture(scope="package")
def published(server: Running) -> Running:
    """The same, with the shared adapters pushed through the command line."""
    for name, folder in ADAPTERS.items():
        done = slipstream(
            Path("/nonexistent"), 1, "adapters", "push", str(shared_path("adapters", folder)), "--name", name,
            SLIPSTREAM_URL=server.url, SLIPSTREAM_API_KEY=server.key,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return server
