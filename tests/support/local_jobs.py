"""A `JobRunner` whose supervisors are tasks of the caller's loop, with a scripted trainer: jobs without Ray."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from support.api_app import ApiWorld, write_adapter

from adapter_registry.jobs import JobRecord
from slipstream.protocol import AdapterRef, BaseModelSpec
from slipstream.training.jobs import JobRunner
from slipstream.training.supervise import Bench, JobSupervisor

WORKER = Path(__file__).resolve().parent / "scripted_worker.py"


class LocalJobRunner(JobRunner):
    """One task for each attempt."""

    def __init__(self, world: ApiWorld, folder: Path) -> None:
        base = folder / "base"
        write_adapter(base / "finished")

        async def fetch(ref: AdapterRef, destination: Path) -> None:
            destination.mkdir()  # noqa: ASYNC240 - a test

        async def base_path() -> Path:
            return base

        self._bench = Bench(
            jobs=world.jobs,
            store=world.store,
            blobs=world.blobs,
            fetch_adapter=fetch,
            base_path=base_path,
            folder=folder / "jobs",
            command=[sys.executable, str(WORKER)],
            poll_s=0.02,
            heartbeat_s=0.1,
        )
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def start(self, job: JobRecord, base: BaseModelSpec) -> None:
        """Have this attempt supervised; nothing happens when it is already."""
        if (job.id, job.attempt) not in self._tasks:
            task = asyncio.create_task(JobSupervisor(job, base, self._bench).run())
            self._tasks[job.id, job.attempt] = task

    async def holds(self, job: JobRecord) -> bool:
        """Whether its task runs."""
        task = self._tasks.get((job.id, job.attempt))
        return task is not None and not task.done()

    async def stop(self, job: JobRecord) -> None:
        """Cancel its task."""
        if (job.id, job.attempt) in self._tasks:
            self._tasks[job.id, job.attempt].cancel()
