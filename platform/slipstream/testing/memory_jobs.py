"""`MemoryJobs`: the registry's `JobStore` without Redis. It passes the same contract tests as `RedisJobs`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from adapter_registry.jobs import (
    MAX_CHECKPOINTS,
    MAX_EVENTS,
    Checkpoint,
    FileRecord,
    JobEvent,
    JobRecord,
    JobStore,
    Page,
    PageQuery,
    check_step,
    in_use,
    no_file,
    no_job,
    not_in_list,
)
from adapter_registry.records import check_name
from slipstream.testing.memory_store import MemoryStore

T = TypeVar("T")
Listed = dict[str, T]  # by id, in order


@dataclass
class _Log:
    events: Listed[JobEvent] = field(default_factory=dict)
    checkpoints: Listed[Checkpoint] = field(default_factory=dict)


@dataclass
class _Tenant:
    files: Listed[FileRecord] = field(default_factory=dict)
    jobs: Listed[JobRecord] = field(default_factory=dict)
    logs: defaultdict[str, _Log] = field(default_factory=lambda: defaultdict(_Log))
    uses: Counter[str] = field(default_factory=Counter)


class MemoryJobs(JobStore):
    """Records in dictionaries; `store` counts the references to blobs, as one Redis does for both real twins."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._tenants: defaultdict[str, _Tenant] = defaultdict(_Tenant)
        self._active: Listed[JobRecord] = {}  # as it was made; the current record is the tenant's
        self._slots: set[str] = set()

    async def add_file(self, file: FileRecord) -> None:
        """Make an uploaded file visible. Raises `BlobMissing` unless its content was claimed and put."""
        mine = self._of(file.tenant)
        if file.id not in mine.files:
            self._store.hold_blob(file.tenant, file.sha256, file.size)
            mine.files[file.id] = file

    async def get_file(self, tenant: str, file_id: str) -> FileRecord:
        """Raises `NotPublished`."""
        found = self._of(tenant).files.get(file_id)
        if found is None:
            raise no_file(file_id)
        return found

    async def list_files(self, tenant: str, query: PageQuery) -> Page[FileRecord]:
        """In order of arrival. Raises `NotPublished` when `after` is not in the list."""
        return page_of(self._of(tenant).files, query)

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Raises `NotPublished`, and `InUse` while a job that has not ended reads it."""
        file = await self.get_file(tenant, file_id)
        if self._of(tenant).uses[file_id]:
            raise in_use(file_id)
        del self._of(tenant).files[file_id]
        self._store.release_blob(tenant, file.sha256)

    async def add_job(self, job: JobRecord) -> None:
        """Keep a new job and protect its files, in one step. Raises `NotPublished` when a file is not there."""
        mine = self._of(job.tenant)
        if job.id in mine.jobs:
            return
        for file_id in job.files:
            if file_id not in mine.files:
                raise no_file(file_id)
        mine.uses.update(job.files)
        mine.jobs[job.id] = self._active[job.id] = job

    async def get_job(self, tenant: str, job_id: str) -> JobRecord:
        """Raises `NotPublished`."""
        found = self._of(tenant).jobs.get(job_id)
        if found is None:
            raise no_job(job_id)
        return found

    async def list_jobs(self, tenant: str, query: PageQuery) -> Page[JobRecord]:
        """In order of creation. Raises `NotPublished` when `after` is not in the list."""
        return page_of(self._of(tenant).jobs, query)

    async def update_job(self, tenant: str, job_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Replace a job by what `change` makes of it; see `JobStore`."""
        before = await self.get_job(tenant, job_id)
        after = check_step(before, change(before))
        self._of(tenant).jobs[job_id] = after
        if after.state.is_terminal and not before.state.is_terminal:
            self._of(tenant).uses.subtract(before.files)
        return after

    async def add_event(self, tenant: str, job_id: str, event: JobEvent) -> None:
        """Append to the job's log; an event whose id is there already is not added again."""
        _add(self._of(tenant).logs[job_id].events, event.id, event, MAX_EVENTS)

    async def list_events(self, tenant: str, job_id: str, query: PageQuery) -> Page[JobEvent]:
        """Raises `NotPublished`."""
        await self.get_job(tenant, job_id)
        return page_of(self._of(tenant).logs[job_id].events, query)

    async def add_checkpoint(self, tenant: str, job_id: str, checkpoint: Checkpoint) -> None:
        """As `add_event`."""
        _add(self._of(tenant).logs[job_id].checkpoints, checkpoint.id, checkpoint, MAX_CHECKPOINTS)

    async def list_checkpoints(self, tenant: str, job_id: str, query: PageQuery) -> Page[Checkpoint]:
        """Raises `NotPublished`."""
        await self.get_job(tenant, job_id)
        return page_of(self._of(tenant).logs[job_id].checkpoints, query)

    async def active(self) -> Sequence[JobRecord]:
        """Every tenant's jobs that were not retired, in order of creation."""
        return [self._of(job.tenant).jobs[job.id] for job in self._active.values()]

    async def take_slot(self, job: JobRecord, limit: int) -> bool:
        """Whether `job` is among the at most `limit` jobs that run at once, now or already."""
        if job.id not in self._slots and len(self._slots) >= limit:
            return False
        self._slots.add(job.id)
        return True

    async def retire(self, job: JobRecord) -> None:
        """The job has ended and its worker is gone: free its slot and leave it out of `active`."""
        self._slots.discard(job.id)
        self._active.pop(job.id, None)

    async def close(self) -> None:
        """Nothing to give back."""

    def _of(self, tenant: str) -> _Tenant:
        return self._tenants[check_name(tenant, "tenant")]


def _add(items: Listed[T], item_id: str, item: T, limit: int) -> None:
    items.setdefault(item_id, item)
    while len(items) > limit:
        del items[next(iter(items))]


def page_of(items: Listed[T], query: PageQuery) -> Page[T]:
    """A page of what is listed by id, in order."""
    ids = list(reversed(items) if query.newest_first else items)
    if query.after is not None and query.after not in items:
        raise not_in_list(query.after)
    first = ids.index(query.after) + 1 if query.after is not None else 0
    last = first + query.limit
    return Page([items[item_id] for item_id in ids[first:last]], has_more=len(ids) > last)
