"""What only the Redis twin of the job store has: an index beside the records, and answers that get lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from support.jobs import claimed, file_record, job_record
from support.redis_server import RedisServer, running_redis

from adapter_registry.errors import NotPublished, StoreUnavailable
from adapter_registry.jobs import JobRecord, JobState
from adapter_registry.redis_jobs import RedisJobs
from adapter_registry.redis_store import RedisStore

pytestmark = pytest.mark.redis


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with running_redis() as started:
        yield started


@pytest_asyncio.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    made = RedisStore.from_url(server.url)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def jobs(server: RedisServer) -> AsyncIterator[RedisJobs]:
    made = RedisJobs.from_url(server.url, timeout_s=0.5, retries=0)
    yield made
    await made.close()


async def added(store: RedisStore, jobs: RedisJobs) -> JobRecord:
    file = await claimed(store, file_record())
    await jobs.add_file(file)
    job = job_record(file)
    await jobs.add_job(job)
    return job


async def test_a_job_that_was_never_written_leaves_the_index(
    store: RedisStore, jobs: RedisJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotPublished):
        await jobs.add_job(job_record(file_record()))
    assert await jobs.active() == []
    assert await jobs._command("ZCARD", "slipstream:{jobs}:active") == 1  # it may be on its way
    monkeypatch.setattr("adapter_registry.redis_jobs._ABANDONED_MS", -1)
    assert await jobs.active() == []
    assert await jobs._command("ZCARD", "slipstream:{jobs}:active") == 0


async def test_a_change_whose_answer_was_lost_is_made_once(
    store: RedisStore, jobs: RedisJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await added(store, jobs)
    script, calls = jobs._script, 0

    async def sent_twice(name: str, keys: Any, args: Any) -> Any:
        nonlocal calls
        calls += name == "job_replace"
        if name == "job_replace":
            await script(name, keys, args)
        return await script(name, keys, args)

    monkeypatch.setattr(jobs, "_script", sent_twice)
    ended = await jobs.update_job("acme", job.id, lambda found: found.moved(JobState.CANCELLED))
    assert (ended.state, calls) == (JobState.CANCELLED, 1)
    await jobs.delete_file("acme", job.training_file)  # let go of once: the count did not go below none
    assert await jobs._command("HLEN", "slipstream:{acme}:files:uses") == 0


async def test_records_outlive_the_server(server: RedisServer, store: RedisStore, jobs: RedisJobs) -> None:
    job = await added(store, jobs)
    assert await jobs.take_slot(job, 1)
    server.stop(kill=True)
    with pytest.raises(StoreUnavailable):
        await jobs.get_job("acme", job.id)
    server.start()
    assert await jobs.get_job("acme", job.id) == job
    assert list(await jobs.active()) == [job]
    assert not await jobs.take_slot(job_record(file_record()), 1)
