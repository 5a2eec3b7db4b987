"""`EngineClient` over a Serve handle: the gateway's view of an engine in another process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.engine_replica import Refusal
from slipstream.errors import EngineFailed, Overloaded, SlipstreamError, Unavailable
from slipstream.protocol import BaseModelSpec, EngineStats, GenerateEvent, GenerateRequest

_CALL_TIMEOUT_S = 10.0


class ReplicaLost(Unavailable):
    """The replica died with this request on it."""


class RayEngineClient:
    """Sends each request to a replica of one `EngineReplica` deployment. `n` choices are one call: a router of Ray's
    that has no FIFO order hangs on several calls under one parent request."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._unary: Any = handle
        self._stream: Any = handle.options(stream=True)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[GenerateEvent], None]:
        """As `EngineClient.generate`. A request whose replica dies before its first event is sent once more: the seed
        is in the request, so the second try gives the text that the first would have given."""
        send = self._streamed if request.stream else self._whole
        for last_try in (False, True):
            begun = False
            events = send(request)
            try:
                async for batch in events:
                    begun = True
                    yield batch
                return
            except ReplicaLost:
                if begun or last_try:
                    raise
            finally:
                await events.aclose()

    async def _streamed(self, request: GenerateRequest) -> Any:
        response = self._stream.generate.remote(request)
        finished = False
        try:
            async for message in response:
                if isinstance(message, Refusal):
                    raise message.error
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
        if isinstance(message, Refusal):
            raise message.error
        yield message

    async def describe(self) -> BaseModelSpec:
        """The base model behind the handle."""
        spec: BaseModelSpec = await self._call("describe")
        return spec

    async def stats(self) -> EngineStats:
        """A replica's counters."""
        stats: EngineStats = await self._call("stats")
        return stats

    async def _call(self, method: str) -> Any:
        response = getattr(self._unary, method).remote()
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await response
        except TimeoutError as error:
            response.cancel()
            raise Unavailable("No engine replica answers. Try again.") from error
        except (RayError, RayServeException) as error:
            raise_ours(error)


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
