"""The Ray engine client against a stand-in for the Serve handle: errors, cancelling and the one retry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.engine_client import RayEngineClient
from deployments.engine_replica import Refusal
from slipstream.errors import EngineFailed, InvalidRequest, Overloaded, SlipstreamError, Unavailable
from slipstream.protocol import GenerateEvent, GenerateRequest, SamplingParams

EVENTS = [GenerateEvent(0, " a", (1,)), GenerateEvent(0, " b", (2,))]


class FakeResponse:
    """One call: a list of messages, an error, or a wait without end."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.cancelled = script, False

    async def _play(self) -> AsyncIterator[Any]:
        for message in self.script:
            if message is ...:
                await asyncio.sleep(3600)
            if isinstance(message, Exception):
                raise message
            yield message

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._play()

    def __await__(self) -> Any:
        return anext(self._play()).__await__()

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """Hands out scripted calls, one after the other, whatever the method."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.calls = list(scripts), list[FakeResponse]()

    def options(self, **options: Any) -> FakeHandle:
        return self

    def __getattr__(self, method: str) -> Any:
        handle = self

        class Method:
            def remote(self, *arguments: Any) -> FakeResponse:
                handle.calls.append(FakeResponse(handle.scripts[len(handle.calls)]))
                return handle.calls[-1]

        return Method()


def request(stream: bool) -> GenerateRequest:
    return GenerateRequest("r", "acme", SamplingParams(), text="hi", stream=stream)


def from_ray(error: Exception) -> Exception:
    wrapped: Exception = RayTaskError("generate", "a traceback full of internals", error)
    return wrapped


async def collect(handle: FakeHandle, stream: bool = True) -> list[GenerateEvent]:
    return [event async for batch in RayEngineClient(handle).generate(request(stream)) for event in batch]


@pytest.mark.parametrize("stream", [True, False])
async def test_yields_what_the_replica_sends(stream: bool) -> None:
    handle = FakeHandle([EVENTS])
    assert await collect(handle, stream) == EVENTS
    assert not handle.calls[0].cancelled


@pytest.mark.parametrize("stream", [True, False])
async def test_raises_what_the_replica_refused_with(stream: bool) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await collect(FakeHandle([Refusal(InvalidRequest("no", param="prompt"))]), stream)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (lambda: from_ray(Overloaded("full")), Overloaded),
        (lambda: BackPressureError(3, 2), Overloaded),
        (lambda: from_ray(BackPressureError(3, 2)), Overloaded),
        (lambda: DeploymentUnavailableError(None), Unavailable),
        (lambda: from_ray(ValueError("secret")), EngineFailed),
    ],
)
async def test_rays_errors_become_ours(
    error: Callable[[], Exception], ours: type[SlipstreamError], stream: bool
) -> None:
    with pytest.raises(ours) as caught:
        await collect(FakeHandle([error()]), stream)
    assert type(caught.value) is ours
    assert "secret" not in str(caught.value)
    assert "traceback" not in str(caught.value)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_replica_that_dies_before_the_first_event_is_tried_once_more(stream: bool) -> None:
    assert await collect(FakeHandle([ActorDiedError()], [EVENTS]), stream) == EVENTS
    with pytest.raises(Unavailable):
        await collect(FakeHandle([ActorDiedError()], [ActorDiedError()], [EVENTS]), stream)


async def test_a_replica_that_dies_later_is_not_retried() -> None:
    handle = FakeHandle([EVENTS, ActorDiedError()], [EVENTS])
    with pytest.raises(Unavailable):
        await collect(handle)
    assert len(handle.calls) == 1


async def test_closing_a_stream_cancels_the_call() -> None:
    handle = FakeHandle([EVENTS, ...])
    events: Any = RayEngineClient(handle).generate(request(stream=True))
    await anext(events)
    await events.aclose()
    assert handle.calls[0].cancelled


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_a_waiting_reader_cancels_the_call(stream: bool) -> None:
    handle = FakeHandle([...])
    reader = asyncio.ensure_future(collect(handle, stream))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert handle.calls[0].cancelled


async def test_a_call_that_ray_cancelled_is_a_cancellation() -> None:
    with pytest.raises(asyncio.CancelledError):
        await collect(FakeHandle([TaskCancelledError()]))


async def test_describe_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.engine_client._CALL_TIMEOUT_S", 0.01)
    handle = FakeHandle([...])
    with pytest.raises(Unavailable):
        await RayEngineClient(handle).describe()
    assert handle.calls[0].cancelled
