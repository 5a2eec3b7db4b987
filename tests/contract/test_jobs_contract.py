"""One suite for every `JobStore`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.jobs import claimed, file_record, job_record

from adapter_registry.errors import BlobMissing, InUse, NotPublished, RegistryError
from adapter_registry.jobs import (
    CHECKPOINT_PREFIX,
    EVENT_PREFIX,
    NEXT_STATES,
    Checkpoint,
    FileRecord,
    IllegalTransition,
    JobError,
    JobEvent,
    JobRecord,
    JobState,
    JobStore,
    PageQuery,
    ask_to_cancel,
    new_id,
)
from adapter_registry.records import utc_now
from adapter_registry.store import Store

NOWHERE = "ftjob-" + "0" * 24


async def added_file(store: Store, jobs: JobStore, text: str = "rows", tenant: str = "acme") -> FileRecord:
    file = await claimed(store, file_record(text, tenant))
    await jobs.add_file(file)
    return file


async def added_job(store: Store, jobs: JobStore, tenant: str = "acme", **fields: Any) -> JobRecord:
    job = job_record(await added_file(store, jobs, tenant=tenant), **fields)
    await jobs.add_job(job)
    return job


def to(state: JobState, **changes: object) -> Callable[[JobRecord], JobRecord]:
    return lambda job: job.moved(state, **changes)


def event(text: str) -> JobEvent:
    return JobEvent(id=new_id(EVENT_PREFIX), created_at=utc_now(), message=text, data={"step": 1, "loss": 0.5})


# --- files ---


async def test_a_file_comes_back_exactly(store: Store, jobs: JobStore) -> None:
    file = await added_file(store, jobs)
    await jobs.add_file(file)  # as a retry does
    assert await jobs.get_file("acme", file.id) == file
    assert list((await jobs.list_files("acme", PageQuery())).items) == [file]


async def test_a_files_content_must_be_claimed(jobs: JobStore) -> None:
    with pytest.raises(BlobMissing):
        await jobs.add_file(file_record())


async def test_the_sweep_spares_the_content_until_the_last_file_is_deleted(store: Store, jobs: JobStore) -> None:
    first, second = await added_file(store, jobs), await added_file(store, jobs)
    assert first.sha256 == second.sha256
    for file, garbage in ((first, []), (second, [first.sha256])):
        assert list(await store.begin_sweep("acme", 0)) == []
        await jobs.delete_file("acme", file.id)
        assert list(await store.begin_sweep("acme", 0)) == garbage
    assert not (await jobs.list_files("acme", PageQuery())).items


async def test_another_tenants_file_looks_unknown(store: Store, jobs: JobStore) -> None:
    file = await added_file(store, jobs)
    messages = set()
    for tenant, file_id in (("globex", file.id), ("acme", "file-" + "0" * 24)):
        for call in (jobs.get_file, jobs.delete_file):
            with pytest.raises(NotPublished) as caught:
                await call(tenant, file_id)
            messages.add(str(caught.value).replace(file_id, "ID"))
    assert len(messages) == 1
    assert not (await jobs.list_files("globex", PageQuery())).items


async def test_pages_follow_one_another(store: Store, jobs: JobStore) -> None:
    files = [await added_file(store, jobs, f"{number}") for number in range(12)]
    for newest_first in (False, True):
        expected = files[::-1] if newest_first else files
        seen: list[FileRecord] = []
        while True:
            after = seen[-1].id if seen else None
            page = await jobs.list_files("acme", PageQuery(after, 5, newest_first))
            seen += page.items
            if not page.has_more:
                break
        assert seen == expected
    with pytest.raises(NotPublished):
        await jobs.list_files("acme", PageQuery(after="file-" + "0" * 24))


async def test_a_file_cannot_go_while_a_job_reads_it(store: Store, jobs: JobStore) -> None:
    file = await added_file(store, jobs)
    first, second = job_record(file), job_record(file, validation_file=file.id)
    for job in (first, second, second):
        await jobs.add_job(job)
    for job in (first, second):
        with pytest.raises(InUse):
            await jobs.delete_file("acme", file.id)
        await jobs.update_job("acme", job.id, to(JobState.CANCELLED))
    await jobs.delete_file("acme", file.id)


async def test_a_job_needs_its_files(store: Store, jobs: JobStore) -> None:
    file = await added_file(store, jobs)
    with pytest.raises(NotPublished):
        await jobs.add_job(job_record(file_record()))
    with pytest.raises(NotPublished):
        await jobs.add_job(job_record(file, validation_file="file-" + "0" * 24))
    with pytest.raises(NotPublished):
        await jobs.add_job(job_record(file, tenant="globex"))
    await jobs.delete_file("acme", file.id)  # nothing holds it


# --- jobs ---


async def test_a_job_comes_back_exactly(store: Store, jobs: JobStore) -> None:
    options = {"method": "turbo_lora", "streams": 3, "stream_rank": None}
    job = await added_job(store, jobs, options=options, metadata={"team": "search"})
    assert await jobs.get_job("acme", job.id) == job
    assert list((await jobs.list_jobs("acme", PageQuery())).items) == [job]
    assert list(await jobs.active()) == [job]


async def test_another_tenants_job_looks_unknown(store: Store, jobs: JobStore) -> None:
    job = await added_job(store, jobs)
    calls: list[Callable[[str, str], Any]] = [
        jobs.get_job,
        lambda tenant, job_id: jobs.update_job(tenant, job_id, to(JobState.FAILED)),
        lambda tenant, job_id: jobs.list_events(tenant, job_id, PageQuery()),
        lambda tenant, job_id: jobs.list_checkpoints(tenant, job_id, PageQuery()),
    ]
    for call in calls:
        messages = set()
        for tenant, job_id in (("globex", job.id), ("acme", NOWHERE)):
            with pytest.raises(NotPublished) as caught:
                await call(tenant, job_id)
            messages.add(str(caught.value).replace(job_id, "ID"))
        assert len(messages) == 1
    assert not (await jobs.list_jobs("globex", PageQuery())).items


@pytest.mark.parametrize("state", list(JobState))
@pytest.mark.parametrize("wanted", list(JobState))
async def test_only_the_tables_steps_are_taken(store: Store, jobs: JobStore, state: JobState, wanted: JobState) -> None:
    job = await added_job(store, jobs, state=state)
    if wanted in NEXT_STATES[state]:
        assert (await jobs.update_job("acme", job.id, to(wanted))).state is wanted
    elif wanted is not state:
        with pytest.raises(IllegalTransition):
            await jobs.update_job("acme", job.id, to(wanted))
        with pytest.raises(IllegalTransition):  # whatever the change itself believes
            await jobs.update_job("acme", job.id, lambda found: found.model_copy(update={"state": wanted}))
        assert (await jobs.get_job("acme", job.id)).state is state


async def test_a_job_that_ended_never_changes(store: Store, jobs: JobStore) -> None:
    job = await added_job(store, jobs, state=JobState.SUCCEEDED)
    with pytest.raises(IllegalTransition):
        await jobs.update_job("acme", job.id, lambda found: found.model_copy(update={"attempt": 9}))
    assert await jobs.get_job("acme", job.id) == job


async def test_of_many_ends_one_is_taken(store: Store, jobs: JobStore) -> None:
    job = await added_job(store, jobs, state=JobState.RUNNING)
    error = JobError(code="worker_lost", message="Gone.")
    ends = [to(JobState.SUCCEEDED), to(JobState.FAILED, error=error), to(JobState.CANCELLED)] * 5
    answers = await asyncio.gather(*(jobs.update_job("acme", job.id, e) for e in ends), return_exceptions=True)
    won = [answer for answer in answers if isinstance(answer, JobRecord)]
    assert len(won) == 1
    assert all(isinstance(answer, IllegalTransition) for answer in answers if answer not in won)
    assert await jobs.get_job("acme", job.id) == won[0]
    await jobs.delete_file("acme", job.training_file)


async def test_no_change_is_lost(store: Store, jobs: JobStore) -> None:
    job = await added_job(store, jobs)
    await asyncio.gather(
        *(jobs.update_job("acme", job.id, lambda j: j.changed(attempt=j.attempt + 1)) for _ in range(20))
    )
    assert (await jobs.get_job("acme", job.id)).attempt == 20


@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ({}, True),
        ({"attempt": 1}, False),
        ({"state": JobState.VALIDATING_FILES, "attempt": 1}, False),
        ({"state": JobState.RUNNING, "attempt": 1}, False),
    ],
)
async def test_cancelling(store: Store, jobs: JobStore, fields: dict[str, Any], ends: bool) -> None:
    job = await added_job(store, jobs, **fields)
    for _ in range(1 if ends else 2):
        asked = await jobs.update_job("acme", job.id, lambda found: ask_to_cancel(found, utc_now()))
        assert asked.cancel_requested
        assert (asked.state is JobState.CANCELLED) == ends


@pytest.mark.parametrize(
    "fields",
    [
        {"state": JobState.RUNNING, "publishing": True},
        *({"state": state} for state in JobState if not NEXT_STATES[state]),
    ],
)
async def test_cancelling_too_late(store: Store, jobs: JobStore, fields: dict[str, Any]) -> None:
    job = await added_job(store, jobs, **fields)
    with pytest.raises(IllegalTransition):
        await jobs.update_job("acme", job.id, lambda found: ask_to_cancel(found, utc_now()))
    assert await jobs.get_job("acme", job.id) == job


async def test_a_change_that_raises_changes_nothing(store: Store, jobs: JobStore) -> None:
    def refuse(_: JobRecord) -> JobRecord:
        raise RegistryError("no")

    job = await added_job(store, jobs)
    with pytest.raises(RegistryError, match="no"):
        await jobs.update_job("acme", job.id, refuse)
    assert await jobs.get_job("acme", job.id) == job


# --- events and checkpoints ---


async def test_events_are_kept_once_and_in_order(store: Store, jobs: JobStore) -> None:
    job = await added_job(store, jobs)
    events = [event(f"step {number}") for number in range(5)]
    for each in (*events, events[0]):
        await jobs.add_event("acme", job.id, each)
    first = await jobs.list_events("acme", job.id, PageQuery(limit=2))
    assert (list(first.items), first.has_more) == (events[:2:-1], True)
    rest = await jobs.list_events("acme", job.id, PageQuery(after=events[3].id, limit=10))
    assert (list(rest.items), rest.has_more) == (events[2::-1], False)


async def test_a_log_is_bounded(store: Store, jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("adapter_registry.redis_jobs", "slipstream.testing.memory_jobs"):
        monkeypatch.setattr(f"{module}.MAX_EVENTS", 3)
    job = await added_job(store, jobs)
    events = [event(f"step {number}") for number in range(7)]
    for each in events:
        await jobs.add_event("acme", job.id, each)
    page = await jobs.list_events("acme", job.id, PageQuery(newest_first=False))
    assert list(page.items) == events[-3:]


async def test_checkpoints(store: Store, jobs: JobStore) -> None:
    job = await added_job(store, jobs)
    saved = Checkpoint(
        id=new_id(CHECKPOINT_PREFIX),
        created_at=utc_now(),
        step=20,
        metrics={"valid_loss": 0.25},
        fine_tuned_model_checkpoint="sql:ckpt-step-20",
    )
    await jobs.add_checkpoint("acme", job.id, saved)
    assert list((await jobs.list_checkpoints("acme", job.id, PageQuery())).items) == [saved]
    other = await added_job(store, jobs)
    assert not (await jobs.list_checkpoints("acme", other.id, PageQuery())).items


# --- what runs ---


async def test_active_jobs_of_all_tenants_in_order(store: Store, jobs: JobStore) -> None:
    made = [await added_job(store, jobs, tenant) for tenant in ("acme", "globex", "acme")]
    assert list(await jobs.active()) == made
    await jobs.retire(made[0])
    await jobs.retire(made[0])
    assert list(await jobs.active()) == made[1:]
    assert await jobs.get_job("acme", made[0].id) == made[0]


async def test_slots_are_bounded(store: Store, jobs: JobStore) -> None:
    made = [await added_job(store, jobs) for _ in range(5)]
    taken = await asyncio.gather(*(jobs.take_slot(job, 2) for job in made))
    assert sum(taken) == 2
    held = [job for job, has in zip(made, taken, strict=True) if has]
    assert await jobs.take_slot(held[0], 2)  # it has one already
    await jobs.retire(held[0])
    waiting = next(job for job in made if job not in held)
    assert await jobs.take_slot(waiting, 2)
    assert not await jobs.take_slot(held[0], 2)
