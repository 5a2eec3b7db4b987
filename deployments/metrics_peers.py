"""A gateway's way to what all other replicas of the application count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.serve_states import ServedModel, States, replica_states
from slipstream.errors import Unavailable
from slipstream.metrics.pages import Gathered, MetricsPeers, Page, Process

_KNOWN_S = 600.0  # how long a replica that said something once can be missed
_UNKNOWN = "unknown"  # one that runs, as Serve says, and has never said anything


class RayPeers(MetricsPeers):
    """From inside a gateway replica. A replica is asked by Serve's broadcast, which reaches those that run and wakes none."""

    def __init__(self, models: Mapping[str, ServedModel], engines: Mapping[str, DeploymentHandle]) -> None:
        context = serve.get_replica_context()
        self._app, self._deployment = context.app_name, context.deployment
        self._own = str(context.replica_id.unique_id)
        self._models, self._engines = models, engines
        self._gateways: Any = None  # Serve gives no handle to a deployment that is still starting
        self._seen: dict[Process, float] = {}

    @property
    def own_name(self) -> str:
        """Serve's id of this replica."""
        return self._own

    async def gather(self, timeout_s: float) -> Gathered:
        """See `MetricsPeers`."""
        if self._gateways is None:
            self._gateways = serve.get_deployment_handle(self._deployment, self._app)
        handles = (self._gateways, *self._engines.values())
        states, *answers = await asyncio.gather(
            self._states(timeout_s), *(ask_all(handle, "metrics", timeout_s) for handle in handles)
        )
        pages = {page.process: page for found in answers for page in found if isinstance(page, Page)}
        pages.pop(Process(self._own), None)
        self._remember(pages)
        gateways = states.get(self._deployment, {}).get("RUNNING", 0) - 1
        silent = self._silent("", gateways, pages)
        for model, served in self._models.items():
            silent += self._silent(model, states.get(served.deployment, {}).get("RUNNING", 0), pages)
        return Gathered(list(pages.values()), silent)

    async def _states(self, timeout_s: float) -> Mapping[str, States]:
        try:
            return await asyncio.wait_for(replica_states(self._app), timeout_s)
        except (TimeoutError, Unavailable):  # the controller is away: nobody can tell who should have answered
            return {}

    def _remember(self, pages: Mapping[Process, Page]) -> None:
        now = time.monotonic()
        self._seen |= dict.fromkeys(pages, now)
        self._seen = {process: at for process, at in self._seen.items() if now - at < _KNOWN_S}

    def _silent(self, model: str, running: int, pages: Mapping[Process, Page]) -> list[Process]:
        """Who of `running` replicas said nothing: those that did so last. One that has ended is not among those that run."""
        missing = running - sum(process.model == model for process in pages)
        absent = [process for process in self._seen if process.model == model and process not in pages]
        absent.sort(key=self._seen.__getitem__, reverse=True)
        known = absent[: max(0, missing)]
        return known + [Process(_UNKNOWN, model)] * (missing > len(known))


async def ask_all(handle: Any, method: str, timeout_s: float) -> Sequence[Any]:
    """What each replica that runs says within the time. Serve's own `results_async` gives nothing when one of them hangs."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            asked = await handle.broadcast(method)._fetch_replica_results_async()
    except (TimeoutError, RayError, RayServeException):  # none runs, among others
        return []
    answers = [asyncio.ensure_future(each.get_async()) for each in asked]
    if not answers:
        return []
    done, late = await asyncio.wait(answers, timeout=max(0.0, deadline - loop.time()))
    for answer in late:
        answer.cancel()
    return [answer.result() for answer in done if not answer.cancelled() and answer.exception() is None]
