"""Which job runs when: rounds over a job store, with supervisors that do as they are told."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from support.drafts import draft, publish
from support.jobs import claimed, file_record, job_record

from adapter_registry.errors import StoreUnavailable
from adapter_registry.jobs import JobRecord, JobState, PageQuery, ask_to_cancel
from adapter_registry.records import utc_now
from slipstream.errors import NotFound, Unavailable
from slipstream.loops import keep_doing
from slipstream.protocol import BaseModelSpec
from slipstream.testing import FAKE_BASE, MemoryJobs, MemoryStore, ScriptedJobRunner
from slipstream.training.jobs import Rounds

STALE = timedelta(seconds=61)


class World:
    """Rounds over fakes, and a time that moves when told."""

    def __init__(self, max_running: int = 1) -> None:
        self.store = MemoryStore()
        self.jobs = MemoryJobs(self.store)
        self.runner = ScriptedJobRunner()
        self.time = utc_now()
        self.outage: Exception | None = None
        self.rounds = self.gateway(max_running)

    def gateway(self, max_running: int = 1) -> Rounds:
        """One more gateway's rounds."""
        return Rounds(
            jobs=self.jobs,
            store=self.store,
            runner=self.runner,
            base=self._base,
            max_running=max_running,
            now=self._now,
        )

    def _now(self) -> datetime:
        return self.time

    async def _base(self, model: str) -> BaseModelSpec:
        if self.outage is not None:
            raise self.outage
        return FAKE_BASE

    async def job(self, **fields: Any) -> JobRecord:
        file = await claimed(self.store, file_record())
        await self.jobs.add_file(file)
        job = job_record(file, **{"created_at": self.time, **fields})
        await self.jobs.add_job(job)
        return job

    async def found(self, job: JobRecord) -> JobRecord:
        return await self.jobs.get_job(job.tenant, job.id)

    async def set(self, job: JobRecord, state: JobState, **fields: Any) -> JobRecord:
        def change(found: JobRecord) -> JobRecord:
            return found.moved(state, **fields) if state is not found.state else found.changed(**fields)

        return await self.jobs.update_job(job.tenant, job.id, change)

    async def runs(self, job: JobRecord, **fields: Any) -> JobRecord:
        """As if its supervisor had begun."""
        await self.set(job, JobState.VALIDATING_FILES, heartbeat_at=self.time)
        return await self.set(job, JobState.RUNNING, heartbeat_at=self.time, **fields)

    async def log(self, job: JobRecord) -> str:
        page = await self.jobs.list_events(job.tenant, job.id, PageQuery(limit=100, newest_first=False))
        return "\n".join(event.message for event in page.items)

    @property
    def started(self) -> list[tuple[str, int]]:
        return [(job.id, job.attempt) for job, _ in self.runner.started]


@pytest.fixture
def world() -> World:
    return World()


async def test_jobs_run_in_order_of_creation_one_at_a_time(world: World) -> None:
    jobs = [await world.job() for _ in range(3)]
    for number, job in enumerate(jobs):
        for _ in range(3):
            await world.rounds.make()
        assert world.started == [(each.id, 1) for each in jobs[: number + 1]]
        await world.runs(job)
        await world.rounds.make()
        await world.set(job, JobState.SUCCEEDED, finished_at=world.time)
        world.runner.lose(await world.found(job))
    await world.rounds.make()
    assert await world.jobs.active() == []


async def test_as_many_as_allowed_run_at_once() -> None:
    world = World(max_running=2)
    jobs = [await world.job() for _ in range(3)]
    await world.rounds.make()
    assert world.started == [(job.id, 1) for job in jobs[:2]]


async def test_several_gateways_start_a_job_once(world: World) -> None:
    jobs = [await world.job() for _ in range(3)]
    await asyncio.gather(*(world.gateway().make() for _ in range(8)))
    assert world.started == [(jobs[0].id, 1)]


async def test_a_new_gateway_leaves_a_living_job_alone(world: World) -> None:
    job = await world.job()
    await world.rounds.make()
    running = await world.runs(job)
    await world.gateway().make()
    assert await world.found(job) == running
    assert world.started == [(job.id, 1)]


async def test_a_lost_job_is_tried_once_more_then_it_fails(world: World) -> None:
    job = await world.job()
    for attempt in (1, 2):
        await world.rounds.make()
        assert world.started[-1] == (job.id, attempt)
        running = await world.runs(job, estimated_finish=world.time)
        world.runner.lose(running)
        world.time += STALE
        await world.rounds.make()
        found = await world.found(job)
        if attempt == 1:
            assert (found.state, found.heartbeat_at, found.estimated_finish) == (JobState.QUEUED, None, None)
            assert "newest checkpoint" in await world.log(job)
    assert found.state is JobState.FAILED
    assert found.error is not None
    assert found.error.code == "worker_lost"
    assert "2 times" in found.error.message
    assert await world.jobs.active() == []


async def test_a_silent_supervisor_is_stopped_before_another_begins(world: World) -> None:
    job = await world.job()
    await world.rounds.make()
    running = await world.runs(job)
    world.time += STALE
    await world.rounds.make()
    assert world.runner.stopped == [running]


async def test_a_job_keeps_its_place_between_attempts(world: World) -> None:
    first, second = await world.job(), await world.job()
    await world.rounds.make()
    world.runner.lose(await world.runs(first))
    world.time += STALE
    await world.rounds.make()
    await world.rounds.make()
    assert world.started == [(first.id, 1), (first.id, 2)]
    assert (await world.found(second)).attempt == 0


async def test_a_supervisor_that_waits_for_a_machine_is_not_lost(world: World) -> None:
    job = await world.job()
    await world.rounds.make()
    for _ in range(5):
        world.time += STALE
        await world.rounds.make()
    assert world.started == [(job.id, 1)]
    assert "Waiting for a machine" in await world.log(job)
    world.runner.lose(await world.found(job))
    world.time += STALE
    await world.rounds.make()
    await world.rounds.make()
    assert world.started == [(job.id, 1), (job.id, 2)]


async def test_cancelling_what_is_lost_or_has_not_begun(world: World) -> None:
    lost, waiting = await world.job(), await world.job()
    await world.rounds.make()
    world.runner.lose(await world.runs(lost))
    for job in (lost, waiting):
        await world.jobs.update_job(job.tenant, job.id, lambda found: ask_to_cancel(found, world.time))
    world.time += STALE
    await world.rounds.make()
    assert (await world.found(lost)).state is JobState.CANCELLED
    assert (await world.found(waiting)).state is JobState.CANCELLED
    await world.rounds.make()
    assert world.started == [(lost.id, 1)]
    assert await world.jobs.active() == []


@pytest.mark.parametrize("visible", [True, False])
async def test_lost_while_publishing(world: World, visible: bool) -> None:
    job = await world.job()
    await world.rounds.make()
    world.runner.lose(await world.runs(job, publishing=True))
    if visible:
        version = await publish(world.store, draft("a").model_copy(update={"created_by": job.id}))
    world.time += STALE
    await world.rounds.make()
    found = await world.found(job)
    if visible:
        assert (found.state, found.fine_tuned_model) == (JobState.SUCCEEDED, version.ref)
    else:
        assert (found.state, found.publishing) == (JobState.QUEUED, False)


async def test_a_base_model_that_is_gone_ends_the_job(world: World) -> None:
    job = await world.job()
    world.outage = Unavailable("starting")
    await world.rounds.make()
    assert (await world.found(job)).state is JobState.QUEUED
    world.outage = NotFound("not served here", code="model_not_found")
    await world.rounds.make()
    found = await world.found(job)
    assert found.error is not None
    assert (found.state, found.error.code, found.error.param) == (JobState.FAILED, "model_not_found", "model")


async def test_an_ended_job_whose_supervisor_lingers_keeps_its_slot_for_a_while(world: World) -> None:
    job, other = await world.job(), await world.job()
    await world.rounds.make()
    await world.runs(job)
    await world.set(job, JobState.FAILED, finished_at=world.time)
    await world.rounds.make()
    assert world.started == [(job.id, 1)]
    world.time += STALE
    await world.rounds.make()
    await world.rounds.make()
    assert world.started == [(job.id, 1), (other.id, 1)]


async def test_one_broken_job_does_not_stop_the_round(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = await world.job(), await world.job()
    start = world.runner.start

    async def broken(job: JobRecord, base: BaseModelSpec) -> None:
        if job.id == first.id:
            raise Unavailable("no")
        await start(job, base)

    monkeypatch.setattr(world.runner, "start", broken)
    await world.gateway(2).make()
    assert world.started == [(second.id, 1)]
    world.time += STALE  # nobody came for the first one
    monkeypatch.undo()
    await world.gateway(2).make()
    await world.gateway(2).make()
    assert (first.id, 2) in world.started


async def test_rounds_go_on_after_an_outage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.job()
    active, calls = world.jobs.active, 0

    async def flaky() -> Any:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise StoreUnavailable("away")
        return await active()

    monkeypatch.setattr(world.jobs, "active", flaky)
    task = asyncio.create_task(keep_doing("looking after jobs", world.rounds.make, 0.001))
    async with asyncio.timeout(5):
        while not world.started:
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
