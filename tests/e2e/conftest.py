"""One server for all end-to-end tests that do not stop it."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.otlp import Collector, collecting
from support.processes import free_port
from support.serving import Running, serving, slipstream, stop
from support.shared import shared_path

ADAPTERS = {"snips": "snips-turbo", "wikisql": "wikisql-turbo"}


OBSERVED = {
    "SLIPSTREAM_LOG_LEVEL": "DEBUG",
    "SLIPSTREAM_LOG_FORMAT": "json",
    "OTEL_TRACES_SAMPLER": "parentbased_always_off",  # traces of those clients only that ask for one
    "OTEL_BSP_SCHEDULE_DELAY": "100",
}


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Where the server's spans go."""
    with collecting() as found:
        yield found


@pytest.fixture(scope="package")
def server(collector: Collector) -> Iterator[Running]:
    """A running server."""
    more = {**OBSERVED, "SLIPSTREAM_OTLP_ENDPOINT": collector.url, "SLIPSTREAM_WEBHOOK_PRIVATE_HOSTS": '["127.0.0.1"]'}
    with (
        tempfile.TemporaryDirectory(prefix="slip-e2e-") as folder,
        serving(Path(folder) / "home", free_port(), **more) as running,
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
