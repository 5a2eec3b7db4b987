"""The Serve application builder."""

from __future__ import annotations

import pytest

from deployments import app
from slipstream.config import Settings


def test_on_a_cluster_threads_are_the_reserved_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_REDIS_URL", "redis://nowhere")
    monkeypatch.setenv("SLIPSTREAM_ADMIN_KEY", "k" * 16)
    built: list[Settings] = []
    monkeypatch.setattr(app, "build_application", built.append)
    app.build(app.AppArgs(models=[{"id": "a", "engine_cpus": 1.5}, {"id": "b", "engine_threads": 7}]))
    assert [model.engine_threads for model in built[0].models] == [2, 7]
