"""Which job runs when: the seam to whoever runs them, and the round that every gateway makes every few seconds.

Torch-free. Nothing here holds state: jobs are in the `JobStore`, their supervisors (`slipstream.training.supervise`) are
processes of their own, so gateways come and go while jobs run. Several gateways may make their rounds at once: every
step is a compare-and-set, and who comes second does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol

from adapter_registry.errors import NotPublished, RegistryError
from adapter_registry.jobs import (
    EVENT_PREFIX,
    IllegalTransition,
    JobError,
    JobEvent,
    JobRecord,
    JobState,
    JobStore,
    new_id,
)
from adapter_registry.records import AdapterVersion, utc_now
from adapter_registry.store import Store
from slipstream.errors import NotFound, SlipstreamError
from slipstream.protocol import BaseModelSpec

log = logging.getLogger("slipstream.training")
MAX_ATTEMPTS = 2
FindBase = Callable[[str], Awaitable[BaseModelSpec]]  # raises `NotFound` for a base model that is not served here


class JobRunner(Protocol):
    """Runs one supervisor for each attempt at a job, somewhere else."""

    async def start(self, job: JobRecord, base: BaseModelSpec) -> None:
        """Have this attempt supervised; nothing happens when it is already."""
        ...

    async def holds(self, job: JobRecord) -> bool:
        """Whether this attempt's supervisor is alive, or waits for a machine to live on."""
        ...

    async def stop(self, job: JobRecord) -> None:
        """End this attempt's supervisor and its worker at once; nothing happens when they are gone."""
        ...


class Superseded(Exception):
    """Somebody else has changed the job in between: it is theirs now."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """Everything a round needs. The heartbeat is by the training machine's clock: `stale_s` forgives a difference."""

    jobs: JobStore
    store: Store
    runner: JobRunner
    base: FindBase
    max_running: int = 1
    stale_s: float = 60.0  # without a heartbeat: many times a supervisor's own interval
    now: Callable[[], datetime] = utc_now

    async def make(self) -> None:
        """Start what may start, end what was lost."""
        for job in await self.jobs.active():
            try:
                await self._look_at(job)
            except (Superseded, IllegalTransition):
                continue  # the next round sees what came of it
            except (RegistryError, SlipstreamError) as error:
                log.warning("job %s: %s", job.id, error)

    async def _look_at(self, job: JobRecord) -> None:
        if job.state.is_terminal:
            # Its supervisor retires it as its last act; this is for one that was lost just before.
            ended = job.finished_at or job.created_at
            if self.now() - ended > timedelta(seconds=self.stale_s) or not await self.runner.holds(job):
                await self.runner.stop(job)
                await self.jobs.retire(job)
        elif job.state is JobState.QUEUED and job.cancel_requested:
            await self.runner.stop(job)
            await self._end(job, JobState.CANCELLED)
        elif job.state is JobState.QUEUED and job.heartbeat_at is None:
            await self._start(job)
        elif self._stale(job):
            await self._silent(job)

    def _stale(self, job: JobRecord) -> bool:
        beat = job.heartbeat_at or job.created_at
        return self.now() - beat > timedelta(seconds=self.stale_s)

    async def _start(self, job: JobRecord) -> None:
        if not await self.jobs.take_slot(job, self.max_running):
            return
        try:
            base = await self.base(job.model)
        except NotFound as error:
            await self._end(job, JobState.FAILED, JobError(code="model_not_found", message=str(error), param="model"))
            return
        started = await self._change(job, lambda j: j.changed(attempt=j.attempt + 1, heartbeat_at=self.now()))
        await self.runner.start(started, base)

    async def _silent(self, job: JobRecord) -> None:
        if job.state is JobState.QUEUED and await self.runner.holds(job):
            await self._say(job, "Waiting for a machine with free resources.")
            waiting = await self._change(job, lambda j: j.changed(heartbeat_at=self.now()))
            await self.runner.start(waiting, await self.base(job.model))  # who started it may not have got to the end
            return
        await self.runner.stop(job)  # it may be alive and merely cut off: it must not publish later
        if job.publishing and (version := await self._published(job)):
            await self._end(job, JobState.SUCCEEDED, fine_tuned_model=version.ref)
        elif job.cancel_requested:
            await self._end(job, JobState.CANCELLED)
        elif job.attempt < MAX_ATTEMPTS:
            await self._again(job)
        else:
            lost = f"The process that trained went away {job.attempt} times. Its machine may have run out of memory."
            await self._end(job, JobState.FAILED, JobError(code="worker_lost", message=lost))

    async def _again(self, job: JobRecord) -> None:
        def again(found: JobRecord) -> JobRecord:
            waiting = {"heartbeat_at": None, "publishing": False, "estimated_finish": None}
            return (
                found.changed(**waiting) if found.state is JobState.QUEUED else found.moved(JobState.QUEUED, **waiting)
            )

        await self._change(job, again)
        await self._say(job, "The process that trained went away. Going on from the newest checkpoint.", "warn")

    async def _published(self, job: JobRecord) -> AdapterVersion | None:
        try:
            versions = (await self.store.get(job.tenant, job.name)).versions
        except NotPublished:
            return None
        return next((version for version in versions if version.created_by == job.id), None)

    async def _end(self, job: JobRecord, state: JobState, error: JobError | None = None, **fields: object) -> None:
        await self._change(job, lambda j: j.moved(state, error=error, finished_at=self.now(), **fields))
        message = error.message if error else f"The job has {state}."
        await self._say(job, message, "error" if error else "info")
        await self.jobs.retire(job)

    async def _change(self, job: JobRecord, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        def if_unchanged(found: JobRecord) -> JobRecord:
            if found != job:
                raise Superseded
            return change(found)

        return await self.jobs.update_job(job.tenant, job.id, if_unchanged)

    async def _say(self, job: JobRecord, message: str, level: Literal["info", "warn", "error"] = "info") -> None:
        await self.jobs.add_event(job.tenant, job.id, job_event(message, level, self.now()))


def job_event(message: str, level: Literal["info", "warn", "error"] = "info", now: datetime | None = None) -> JobEvent:
    """A line for a job's log."""
    return JobEvent(id=new_id(EVENT_PREFIX), created_at=now or utc_now(), level=level, message=message)
