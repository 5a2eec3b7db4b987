"""`EngineClient` over a Serve handle: the gateway's view of the engines of one base model, in other processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.engine_replica import Refusal
from deployments.route_spans import one_try
from deployments.serve_states import ServedModel, States, replica_states
from slipstream.cluster.view import ReplicaReport, total
from slipstream.errors import EngineFailed, Overloaded, SlipstreamError, Unavailable
from slipstream.protocol import BaseModelSpec, ChoiceProgress, EngineStats, GenerateEvent, GenerateRequest

if TYPE_CHECKING:
    from slipstream.telemetry.tracing import Tracing

log = logging.getLogger("deployments.engine_client")
_CALL_TIMEOUT_S = 1.5  # shorter than the probes that ask
_REPORT_KEPT_S = 30.0
_WAKE_TIMEOUT_S = 600.0  # of a deployment that is asleep: a node may have to come first, and a model be loaded
_LOSSES = 3  # replicas that may die under one request: if it is the request that kills them, it must not kill many
_PAUSE_S = 0.1  # before the second try; doubles. A dead replica leaves the router's list meanwhile


class ReplicaLost(Unavailable):
    """The replica died with this request on it."""


class RayEngineClient:
    """Sends each request to a replica of one `EngineReplica` deployment, and to another one when that dies. `n` choices are
    one call: a router of Ray's that has no FIFO order hangs on several calls under one parent request."""

    def __init__(self, handle: DeploymentHandle, app: str, served: ServedModel, tracing: Tracing | None = None) -> None:
        self._unary: Any = handle
        self._stream: Any = handle.options(stream=True)
        self._app, self._served, self._tracing = app, served, tracing
        self._reported: tuple[float, Mapping[str, ReplicaReport]] = (float("-inf"), {})

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[GenerateEvent], None]:
        """As `EngineClient.generate`. When a replica dies, another one goes on from the tokens that were sent: seed and
        positions are in the request, so the text is what the first would have given, and nothing is sent twice."""
        progress, why = _Progress(request), None
        for losses in range(_LOSSES + 1):
            events = self._try(progress.rest(), losses + 1, why)
            try:
                async for batch in events:
                    progress.note(batch)
                    yield batch
                return
            except ReplicaLost as error:
                if progress.complete:
                    return
                if losses == _LOSSES:
                    raise
                why = str(error.__cause__ and type(error.__cause__).__name__)
                log.warning("request %s goes on elsewhere: its replica was lost (%s)", request.request_id, why)
            finally:
                await events.aclose()
            await asyncio.sleep(_PAUSE_S * 2**losses)

    async def _try(self, request: GenerateRequest, number: int, why: str | None) -> Any:
        send = self._streamed if request.stream else self._whole
        with one_try(self._tracing, request, self._served.deployment, number, why) as traced:
            async with aclosing(send(traced)) as events:
                async for batch in events:
                    yield batch

    async def _streamed(self, request: GenerateRequest) -> Any:
        response = self._stream.generate.remote(request)
        finished = False
        try:
            async for message in response:
                raise_refusal(message)
                yield message
            finished = True
        except (RayError, RayServeException) as error:
            raise_ours(error)
        finally:
            if not finished:
                response.cancel()

    async def _whole(self, request: GenerateRequest) -> Any:
        response = self._unary.generate_all.remote(request)
        try:
            message = await response
        except (RayError, RayServeException) as error:
            raise_ours(error)
        except BaseException:
            response.cancel()
            raise
        raise_refusal(message)
        yield message

    async def describe(self) -> BaseModelSpec:
        """The base model behind the handle. Wakes a deployment that has scaled to zero, and waits for it."""
        response = self._unary.describe.remote()
        try:
            async with asyncio.timeout(_WAKE_TIMEOUT_S):
                spec: BaseModelSpec = await response
        except TimeoutError as error:
            response.cancel()
            raise Unavailable("No engine replica answers. Try again.") from error
        except (RayError, RayServeException) as error:
            raise_ours(error)
        return spec

    async def stats(self) -> EngineStats:
        """The counters of all replicas together; wakes nobody. Raises `Unavailable` when none answers that should."""
        reports = await self.reports()
        if not reports and (self._served.min_replicas or "RUNNING" in await self._states()):
            raise Unavailable("No engine replica runs now.")
        return total([report.stats for report in reports.values()])

    async def _states(self) -> States:
        return (await replica_states(self._app)).get(self._served.deployment, {})

    async def reports(self) -> Mapping[str, ReplicaReport]:
        """What each running replica says of itself, by name. Wakes nobody. While one hangs, the answers of a moment ago."""
        asked = self._unary.broadcast("report")
        now = asyncio.get_running_loop().time()
        try:
            found = await asked.results_async(timeout_s=_CALL_TIMEOUT_S, return_exceptions=True)
        except TimeoutError:
            then, kept = self._reported
            return kept if now - then < _REPORT_KEPT_S else {}
        except (RayError, RayServeException):
            return {}
        reports = {report.replica: report for report in found if isinstance(report, ReplicaReport)}
        self._reported = (now, reports)
        return reports


class _Progress:
    """What has been sent of one request."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._choices = [ChoiceProgress()] * request.params.n
        self._begun = False

    def note(self, batch: list[GenerateEvent]) -> None:
        """Events that the caller has."""
        self._begun = True
        for event in batch:
            done = self._choices[event.index]
            self._choices[event.index] = ChoiceProgress(
                done.token_ids + event.token_ids, done.decode_steps + 1, finished=event.finish_reason is not None
            )

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return all(choice.finished for choice in self._choices)

    def rest(self) -> GenerateRequest:
        """The request for what is missing."""
        return replace(self._request, progress=tuple(self._choices)) if self._begun else self._request


def raise_refusal(message: object) -> None:
    """Raise what a replica refused with. One whose engine has stopped is about to end: as good as lost."""
    if isinstance(message, Refusal):
        if message.bug:
            raise message.error
        if isinstance(message.error, EngineFailed):
            raise ReplicaLost(str(message.error)) from message.error
        raise message.error


def raise_ours(error: Exception) -> NoReturn:
    """Turn what Ray raises into our own tree; what it says about machines and code stays in the logs."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, SlipstreamError):
        raise cause from None
    if isinstance(cause, TaskCancelledError):
        raise asyncio.CancelledError from error
    if isinstance(cause, BackPressureError):
        raise Overloaded("Too many requests are waiting. Try again shortly.") from error
    if isinstance(cause, RayActorError):
        raise ReplicaLost("The engine replica that had this request went away. Try again.") from error
    if isinstance(cause, RayServeException):
        raise Unavailable("No engine replica can take this request now. Try again.") from error
    raise EngineFailed("The engine failed on this request.") from error
