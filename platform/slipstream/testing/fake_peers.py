"""`FakePeers`: a `MetricsPeers` of engines in this process, each as a replica of its own."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.errors import SlipstreamError
from slipstream.metrics.engine import EngineMetrics
from slipstream.metrics.pages import Gathered, MetricsPeers, Page, Process
from slipstream.protocol import EngineClient


class FakePeers(MetricsPeers):
    """Engines by base model, with what observed them; and pages of other processes, as told. Who fails is silent."""

    own_name = "gateway"

    def __init__(
        self, engines: Mapping[str, EngineClient], observers: Mapping[str, EngineMetrics] | None = None
    ) -> None:
        self._engines = engines
        self._observers = {model: EngineMetrics() for model in engines} | dict(observers or {})
        self.others: list[Page] = []
        self.silent: list[Process] = []

    async def gather(self, timeout_s: float) -> Gathered:
        """All of them, at once."""
        pages, silent = list(self.others), list(self.silent)
        for model, engine in self._engines.items():
            process = Process(f"{model}-0", model)
            try:
                pages.append(self._observers[model].page(process, await engine.stats()))
            except SlipstreamError:
                silent.append(process)
        return Gathered(pages, silent)
