"""The Ray engine client against a stand-in for the Serve handle: errors, cancelling, and going on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.trace import StatusCode
from ray.exceptions import ActorDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from support.log_lines import kept_lines
from support.spans import HEADER, PARENT_ID, TRACE_ID, KeptSpans, id_of, parent_of

from deployments.engine_client import RayEngineClient
from deployments.engine_replica import Refusal, refusal
from deployments.route_spans import waiting_span
from deployments.serve_states import ServedModel
from deployments.serving_spans import served
from slipstream.cluster.view import RankReport, ReplicaReport
from slipstream.errors import EngineFailed, InvalidRequest, Overloaded, SlipstreamError, Unavailable
from slipstream.protocol import (
    AdapterRef,
    ChoiceProgress,
    EngineStats,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    Origin,
    SamplingParams,
)
from slipstream.telemetry.tracing import Tracing

EVENTS = [GenerateEvent(0, " a", (1,)), GenerateEvent(0, " b", (2, 3))]
END = [GenerateEvent(0, " c", (4,), finish_reason=FinishReason.STOP)]
SERVED = ServedModel("EngineReplica-x", 1, 1, 1)


def client(handle: Any, served: ServedModel = SERVED, tracing: Tracing | None = None) -> RayEngineClient:
    return RayEngineClient(handle, "app", served, tracing)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.engine_client._PAUSE_S", 0.0)


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
        self.scripts, self.calls, self.asked = list(scripts), list[FakeResponse](), list[GenerateRequest]()

    def options(self, **options: Any) -> FakeHandle:
        return self

    def __getattr__(self, method: str) -> Any:
        handle = self

        class Method:
            def remote(self, *arguments: Any) -> FakeResponse:
                handle.asked.extend(arguments)
                handle.calls.append(FakeResponse(handle.scripts[len(handle.calls)]))
                return handle.calls[-1]

        return Method()


def request(stream: bool) -> GenerateRequest:
    return GenerateRequest("r", "acme", SamplingParams(), text="hi", stream=stream)


def from_ray(error: Exception) -> Exception:
    wrapped: Exception = RayTaskError("generate", "a traceback full of internals", error)
    return wrapped


async def collect(handle: FakeHandle, stream: bool = True) -> list[GenerateEvent]:
    return [event async for batch in client(handle).generate(request(stream)) for event in batch]


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
@pytest.mark.parametrize("error", [ActorDiedError(), Refusal(EngineFailed("the engine stopped"))])
async def test_a_replica_that_dies_before_the_first_event_is_replaced_by_another(stream: bool, error: Any) -> None:
    handle = FakeHandle([error], [EVENTS])
    assert await collect(handle, stream) == EVENTS
    assert [asked.progress for asked in handle.asked] == [(), ()]


async def test_another_replica_goes_on_where_one_died() -> None:
    handle = FakeHandle([EVENTS, ActorDiedError()], [ActorDiedError()], [END])
    assert await collect(handle) == [*EVENTS, *END]
    progress = ChoiceProgress(token_ids=(1, 2, 3), decode_steps=2)
    assert [asked.progress for asked in handle.asked] == [(), (progress,), (progress,)]


async def test_a_request_that_kills_replicas_kills_few() -> None:
    handle = FakeHandle(*[[EVENTS, ActorDiedError()] for _ in range(9)])
    with pytest.raises(Unavailable):
        await collect(handle)
    assert len(handle.calls) == 4


async def test_each_try_is_a_span_and_what_the_replica_draws_is_beneath_it() -> None:
    kept = KeptSpans()
    handle = FakeHandle([EVENTS, ActorDiedError()], [Refusal(EngineFailed("the engine stopped"))], [END])
    traced = replace(request(stream=True), origin=Origin("req-1", HEADER), adapter=AdapterRef("acme", "sha256:a"))
    assert [event async for batch in client(handle, tracing=kept.tracing).generate(traced) for event in batch]
    tries = kept.named("route")
    assert [parent_of(span) for span in tries] == [PARENT_ID] * 3
    seen = [dict(span.attributes or {}) for span in tries]
    assert [each["slipstream.try"] for each in seen] == [1, 2, 3]
    assert [each.get("slipstream.retry.reason") for each in seen] == [None, "ActorDiedError", "EngineFailed"]
    assert [each.get("error.type") for each in seen] == ["ReplicaLost", "ReplicaLost", None]
    assert [asked.origin and asked.origin.traceparent for asked in handle.asked] == [
        f"00-{TRACE_ID}-{id_of(span)}-01" for span in tries
    ]
    assert all(waiting_span(asked) is None for asked in handle.asked), "nothing is left behind"


async def test_the_router_finds_the_span_of_a_try_while_it_waits() -> None:
    kept = KeptSpans()
    handle = FakeHandle([EVENTS, ...])
    events: Any = client(handle, tracing=kept.tracing).generate(
        replace(request(stream=True), origin=Origin("req-1", HEADER))
    )
    await anext(events)
    span = waiting_span(handle.asked[0])
    assert span is not None
    await events.aclose()
    assert waiting_span(handle.asked[0]) is None
    only = kept.only("route")
    assert (only.attributes or {})["slipstream.cancelled"] is True
    assert only.status.status_code is StatusCode.UNSET, "a client that leaves is no error"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_bug_on_one_request_is_not_taken_elsewhere(stream: bool) -> None:
    handle = FakeHandle([Refusal(EngineFailed("The engine failed on this request."), bug=True)], [EVENTS])
    with pytest.raises(EngineFailed):
        await collect(handle, stream)
    assert len(handle.calls) == 1


def test_a_bug_is_logged_by_us_and_not_raised_into_serve_which_would_quote_it() -> None:
    canary = " ".join(("a", "canary", "sings"))
    kept = KeptSpans()
    with (
        kept_lines("ray.serve") as lines,
        served(kept.tracing, replace(request(stream=True), origin=Origin("req-1", HEADER)), "base") as task,
    ):
        try:
            raise ValueError(canary)
        except ValueError as error:
            told = refusal(task, error)
    assert told.bug
    assert isinstance(told.error, EngineFailed)
    assert canary not in lines.told() + str(told.error) + kept.only("replica").to_json()
    assert "builtins.ValueError (what it says is withheld)" in lines.told()
    assert kept.only("replica").status.status_code is StatusCode.ERROR


async def test_a_finished_choice_is_not_asked_for_again() -> None:
    ended = [GenerateEvent(0, " a", (1,), finish_reason=FinishReason.STOP), GenerateEvent(1, " b", (2,))]
    handle = FakeHandle([ended, ActorDiedError()], [END])
    two = replace(request(stream=True), params=SamplingParams(n=2))
    assert [event async for batch in client(handle).generate(two) for event in batch] == [*ended, *END]
    assert handle.asked[1].progress == (ChoiceProgress((1,), 1, finished=True), ChoiceProgress((2,), 1))


async def test_closing_a_stream_cancels_the_call() -> None:
    handle = FakeHandle([EVENTS, ...])
    events: Any = client(handle).generate(request(stream=True))
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
    monkeypatch.setattr("deployments.engine_client._WAKE_TIMEOUT_S", 0.01)
    handle = FakeHandle([...])
    with pytest.raises(Unavailable):
        await client(handle).describe()
    assert handle.calls[0].cancelled


class FakeBroadcast:
    """What all replicas answer, or none."""

    def __init__(self, *reports: Any, error: Exception | None = None) -> None:
        self._reports, self._error = reports, error

    def broadcast(self, method: str) -> FakeBroadcast:
        assert method == "report"
        return self

    async def results_async(self, **options: Any) -> list[Any]:
        if self._error is not None:
            raise self._error
        return list(self._reports)

    def options(self, **options: Any) -> FakeBroadcast:
        return self


def report(name: str) -> ReplicaReport:
    stats = EngineStats(1, 2, 10, 5, 3, 4, 5, 6, 7, 0, 0, {})
    return ReplicaReport(name, (RankReport(0, "127.0.0.1", 1),), 1.0, stats)


async def test_counters_are_of_all_replicas_that_answer() -> None:
    stats = await client(FakeBroadcast(report("a"), report("b"), ActorDiedError())).stats()
    assert (stats.replicas, stats.running, stats.waiting) == (2, 2, 4)


async def test_no_replica_is_sleep_only_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = FakeBroadcast(error=DeploymentUnavailableError(None))
    with pytest.raises(Unavailable):
        await client(nobody).stats()
    states: dict[str, dict[str, int]] = {}

    async def replica_states(app: str) -> dict[str, dict[str, int]]:
        return states

    monkeypatch.setattr("deployments.engine_client.replica_states", replica_states)
    sleepy = ServedModel("EngineReplica-x", 0, 1, 1)
    assert (await client(nobody, sleepy).stats()).replicas == 0
    states["EngineReplica-x"] = {"STARTING": 1}
    assert (await client(nobody, sleepy).stats()).replicas == 0, "on its way: the next request waits for it"
    states["EngineReplica-x"] = {"RUNNING": 1}
    with pytest.raises(Unavailable):
        await client(nobody, sleepy).stats()
