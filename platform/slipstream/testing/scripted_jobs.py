"""`ScriptedJobRunner`: a `JobRunner` that starts nothing; a test says what becomes of each attempt."""

from __future__ import annotations

from adapter_registry.jobs import JobRecord
from slipstream.protocol import BaseModelSpec
from slipstream.training.jobs import JobRunner


class ScriptedJobRunner(JobRunner):
    """Remembers what it was asked; `lose` lets a supervisor vanish as a dead machine would."""

    def __init__(self) -> None:
        self.started: list[tuple[JobRecord, BaseModelSpec]] = []
        self.stopped: list[JobRecord] = []
        self._held: set[tuple[str, int]] = set()

    async def start(self, job: JobRecord, base: BaseModelSpec) -> None:
        """Have this attempt supervised; nothing happens when it is already."""
        if (job.id, job.attempt) not in self._held:
            self._held.add((job.id, job.attempt))
            self.started.append((job, base))

    async def holds(self, job: JobRecord) -> bool:
        """Whether this attempt was started and neither stopped nor lost."""
        return (job.id, job.attempt) in self._held

    async def stop(self, job: JobRecord) -> None:
        """End this attempt's supervisor."""
        if (job.id, job.attempt) in self._held:
            self._held.discard((job.id, job.attempt))
            self.stopped.append(job)

    def lose(self, job: JobRecord) -> None:
        """Let this attempt's supervisor be gone without a word."""
        self._held.discard((job.id, job.attempt))
