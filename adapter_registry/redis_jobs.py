"""`RedisJobs`: training files and jobs in Redis, beside the registry's records and on the same references to blobs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from adapter_registry.errors import BlobMissing, NotPublished, StoreUnavailable
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
from adapter_registry.records import Frozen, check_name
from adapter_registry.redis_connection import RedisConnection
from adapter_registry.scripts import PREFIX, TENANTS_KEY, TenantKeys
from adapter_registry.store import storage_full

JOB_SCRIPTS = ("list_add", "list_page", "file_add", "file_delete", "job_add", "job_replace", "slot_take")
_TRIES = 100  # of a compare-and-set: each failure means that somebody else got on
_ABANDONED_MS = 60_000  # a job that is in the index and nowhere else: whoever made it died in between
# These two are about all tenants, so they have a slot of their own; a job is `tenant/id` in them.
ACTIVE_KEY = PREFIX + "{jobs}:active"  # zset: job -> ms since when
SLOTS_KEY = PREFIX + "{jobs}:slots"  # set: jobs that may run now

R = TypeVar("R")


class _Keys(TenantKeys):
    """A tenant's keys, with those of its files and jobs."""

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        base = f"{PREFIX}{{{check_name(tenant, 'tenant')}}}:"
        self.file_list = (self.files, base + "files:order")  # zset: id -> number
        self.jobs = (base + "jobs", base + "jobs:order")  # hash: id -> record; zset: id -> number
        self.file_uses = base + "files:uses"  # hash: id -> jobs that have not ended and read it; never 0
        self._job_base = base + "job:"

    def of_job(self, job_id: str, what: str) -> tuple[str, str]:
        """The log or the checkpoints of a job. Its id was looked up before, so it is one of ours."""
        return f"{self._job_base}{job_id}:{what}", f"{self._job_base}{job_id}:{what}:order"


class RedisJobs(RedisConnection, JobStore):
    """Build it with `from_url`; one instance serves one event loop."""

    SCRIPTS = JOB_SCRIPTS

    async def add_file(self, file: FileRecord) -> None:
        """Make an uploaded file visible. Raises `BlobMissing` unless its content was claimed and put."""
        keys = _Keys(file.tenant)
        args: list[str | int] = [file.id, file.model_dump_json(), file.sha256, file.size]
        places = [*keys.file_list, keys.refs, keys.garbage, keys.sizes, keys.settings]
        answer = await self._script("file_add", places, args)
        if answer[0] == "unclaimed":
            raise BlobMissing("The file's content is not held for it any more: upload it again.")
        if answer[0] == "full":
            raise storage_full(*map(int, answer[1:]))

    async def get_file(self, tenant: str, file_id: str) -> FileRecord:
        """Raises `NotPublished`."""
        found = await self._command("HGET", _Keys(tenant).files, file_id)
        if not found:
            raise no_file(file_id)
        return FileRecord.model_validate_json(found)

    async def list_files(self, tenant: str, query: PageQuery) -> Page[FileRecord]:
        """In order of arrival. Raises `NotPublished` when `after` is not in the list."""
        return await self._page(_Keys(tenant).file_list, query, FileRecord.model_validate_json)

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Raises `NotPublished`, and `InUse` while a job that has not ended reads it."""
        keys = _Keys(tenant)
        places = [*keys.file_list, keys.file_uses, keys.refs, keys.garbage, keys.sizes]
        answer = await self._script("file_delete", places, [file_id])
        if answer == "missing":
            raise no_file(file_id)
        if answer == "in_use":
            raise in_use(file_id)

    async def add_job(self, job: JobRecord) -> None:
        """Keep a new job and protect its files, in one step. Raises `NotPublished` when a file is not there."""
        keys = _Keys(job.tenant)
        # The index first: a job that is only there is dropped after a while; one that is missing there never starts.
        await self._command("SADD", TENANTS_KEY, job.tenant)
        await self._command("ZADD", ACTIVE_KEY, "NX", str(_now_ms()), _member(job))
        args = [job.id, _stored(job), *job.files]
        if missing := await self._script("job_add", [*keys.jobs, keys.files, keys.file_uses], args):
            raise no_file(missing)

    async def get_job(self, tenant: str, job_id: str) -> JobRecord:
        """Raises `NotPublished`."""
        return _job(await self._read(tenant, job_id))

    async def list_jobs(self, tenant: str, query: PageQuery) -> Page[JobRecord]:
        """In order of creation. Raises `NotPublished` when `after` is not in the list."""
        return await self._page(_Keys(tenant).jobs, query, _job)

    async def update_job(self, tenant: str, job_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Replace a job by what `change` makes of it; see `JobStore`."""
        keys = _Keys(tenant)
        for _ in range(_TRIES):
            stored = await self._read(tenant, job_id)
            before = _job(stored)
            after = check_step(before, change(before))
            released = before.files if after.state.is_terminal and not before.state.is_terminal else ()
            args = [job_id, stored, _stored(after), *released]
            if await self._script("job_replace", [keys.jobs[0], keys.file_uses], args):
                return after
        raise StoreUnavailable(f"The job {job_id} is being changed by too many at once; try again.")

    async def add_event(self, tenant: str, job_id: str, event: JobEvent) -> None:
        """Append to the job's log; an event whose id is there already is not added again."""
        await self._add(_Keys(tenant).of_job(job_id, "events"), event.id, event, MAX_EVENTS)

    async def list_events(self, tenant: str, job_id: str, query: PageQuery) -> Page[JobEvent]:
        """Raises `NotPublished`."""
        await self._read(tenant, job_id)
        return await self._page(_Keys(tenant).of_job(job_id, "events"), query, JobEvent.model_validate_json)

    async def add_checkpoint(self, tenant: str, job_id: str, checkpoint: Checkpoint) -> None:
        """As `add_event`."""
        await self._add(_Keys(tenant).of_job(job_id, "checkpoints"), checkpoint.id, checkpoint, MAX_CHECKPOINTS)

    async def list_checkpoints(self, tenant: str, job_id: str, query: PageQuery) -> Page[Checkpoint]:
        """Raises `NotPublished`."""
        await self._read(tenant, job_id)
        return await self._page(_Keys(tenant).of_job(job_id, "checkpoints"), query, Checkpoint.model_validate_json)

    async def active(self) -> Sequence[JobRecord]:
        """Every tenant's jobs that were not retired, in order of creation."""
        found = await self._command("ZRANGE", ACTIVE_KEY, "0", "-1", "WITHSCORES")
        jobs = []
        for member, since_ms in zip(found[::2], found[1::2], strict=True):
            tenant, _, job_id = member.partition("/")
            try:
                jobs.append(await self.get_job(tenant, job_id))
            except NotPublished:
                if _now_ms() - float(since_ms) > _ABANDONED_MS:
                    await self._forget(member)
        return sorted(jobs, key=lambda job: job.created_at)  # the index counts in milliseconds

    async def take_slot(self, job: JobRecord, limit: int) -> bool:
        """Whether `job` is among the at most `limit` jobs that run at once, now or already."""
        return bool(await self._script("slot_take", [SLOTS_KEY], [_member(job), limit]))

    async def retire(self, job: JobRecord) -> None:
        """The job has ended and its worker is gone: free its slot and leave it out of `active`."""
        await self._forget(_member(job))

    async def _forget(self, member: str) -> None:
        # The slot first: a job that is still in the index is retired again, one that is not would keep its slot.
        await self._command("SREM", SLOTS_KEY, member)
        await self._command("ZREM", ACTIVE_KEY, member)

    async def _read(self, tenant: str, job_id: str) -> str:
        found = await self._command("HGET", _Keys(tenant).jobs[0], job_id)
        if not found:
            raise no_job(job_id)
        return str(found)

    async def _add(self, keys: tuple[str, str], item_id: str, item: Frozen, limit: int) -> None:
        await self._script("list_add", keys, [item_id, item.model_dump_json(), limit])

    async def _page(self, keys: tuple[str, str], query: PageQuery, parse: Callable[[str], R]) -> Page[R]:
        args: list[str | int] = [query.after or "", query.limit, int(query.newest_first)]
        answer: Any = await self._script("list_page", keys, args)
        if answer is None:
            raise not_in_list(query.after or "")
        return Page([parse(item) for item in answer[1:]], bool(answer[0]))


def _stored(job: JobRecord) -> str:
    """A job as it is kept: behind a mark of this very write, so that a retry knows its own earlier try from somebody
    else's identical change."""
    return f"{secrets.token_hex(8)} {job.model_dump_json()}"


def _job(stored: str) -> JobRecord:
    return JobRecord.model_validate_json(stored.partition(" ")[2])


def _member(job: JobRecord) -> str:
    return f"{job.tenant}/{job.id}"


def _now_ms() -> int:
    return int(time.time() * 1000)
