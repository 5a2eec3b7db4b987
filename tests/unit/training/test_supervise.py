"""One attempt at a job, with a scripted trainer in a real process and everything else in memory."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.api_app import write_adapter
from support.jobs import claimed, file_record, job_record
from support.processes import alive, command, descendants, eventually

from adapter_registry.errors import StoreUnavailable
from adapter_registry.jobs import JobRecord, JobState, PageQuery, ask_to_cancel
from adapter_registry.records import AdapterVersion, parse_reference, utc_now
from slipstream.errors import AdapterRejected
from slipstream.protocol import AdapterRef
from slipstream.testing import FAKE_BASE, MemoryBlobs, MemoryJobs, MemoryStore
from slipstream.training.supervise import Bench, JobSupervisor
from slipstream.training.worker_process import EventTail

WORKER = Path(__file__).resolve().parents[2] / "support" / "scripted_worker.py"
ROWS = '{"prompt": "1+1=", "completion": "2"}\n' * 16
BAD_AT_17 = ROWS + '{"prompt": "1+1="}\n'


class World:
    """A job store, a registry and a bench, in memory."""

    def __init__(self, folder: Path, **bench: Any) -> None:
        base = folder / "base"
        write_adapter(base / "finished")
        self.folder = folder / "jobs"
        self.store, self.blobs = MemoryStore(), MemoryBlobs()
        self.jobs = MemoryJobs(self.store)
        self.fetched: list[AdapterRef] = []

        async def fetch(ref: AdapterRef, destination: Path) -> None:
            self.fetched.append(ref)
            destination.mkdir()  # noqa: ASYNC240 - a test

        async def base_path() -> Path:
            return base

        self.bench = Bench(
            jobs=self.jobs,
            store=self.store,
            blobs=self.blobs,
            fetch_adapter=fetch,
            base_path=base_path,
            folder=self.folder,
            command=[sys.executable, str(WORKER)],
            **{"poll_s": 0.02, "heartbeat_s": 0.05, "grace_s": 0.3, **bench},
        )

    async def job(self, name: str, rows: str = ROWS, **fields: Any) -> JobRecord:
        """A job as a gateway hands it to a supervisor."""
        file = await claimed(self.store, file_record(rows))
        await self.blobs.put_bytes("acme", file.sha256, rows.encode())
        await self.jobs.add_file(file)
        job = job_record(file, name=name, attempt=1, heartbeat_at=utc_now(), **fields)
        await self.jobs.add_job(job)
        return job

    async def run(self, job: JobRecord) -> JobRecord:
        """See the attempt through."""
        await JobSupervisor(job, FAKE_BASE, self.bench).run()
        return await self.jobs.get_job("acme", job.id)

    async def until(self, job: JobRecord, condition: Callable[[JobRecord], bool]) -> JobRecord:
        """Wait for the job."""
        async with asyncio.timeout(20):
            while not condition(found := await self.jobs.get_job("acme", job.id)):
                await asyncio.sleep(0.01)
        return found

    async def log(self, job: JobRecord) -> list[str]:
        """What the job said, oldest first."""
        page = await self.jobs.list_events("acme", job.id, PageQuery(limit=100, newest_first=False))
        return [event.message for event in page.items]

    async def assert_nothing_published(self) -> None:
        assert await self.store.list("acme") == []


def trainers() -> set[int]:
    """The scripted trainers that run: not what other tests of this process left to be reaped."""
    return {pid for pid in descendants(os.getpid()) if WORKER.name in command(pid)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A fresh one."""
    return World(tmp_path)


async def test_a_job_that_works_is_published(world: World) -> None:
    job = await world.job("good", metadata={"a": "b"}, options={"method": "lora", "seed": 7})
    done = await world.run(job)
    assert (done.state, done.fine_tuned_model, done.trained_tokens, done.error) == (
        JobState.SUCCEEDED,
        "good@1",
        1234,
        None,
    )
    assert done.started_at is not None
    assert done.finished_at is not None
    assert job.created_at <= done.started_at <= done.finished_at
    assert done.estimated_finish is not None
    version = await world.store.resolve("acme", parse_reference("good"))
    assert (version.created_by, version.speculation.enabled) == (job.id, True)
    assert await world.blobs.exists("acme", version.files[0].sha256)
    log = await world.log(job)
    assert [line for line in log if line.startswith("Step ")] == [
        "Step 1/3: train/loss=1",
        "Step 2/3: train/loss=0.5",
        "Step 3/3: train/loss=0.3333",
    ]
    assert log[-1] == "Published good@1."
    events = (await world.jobs.list_events("acme", job.id, PageQuery(limit=100))).items
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics[-1] == {"step": 1, "total": 3, "train/loss": 1.0}
    assert await world.jobs.active() == []
    assert [path.name for path in (world.folder / job.id).iterdir()] == ["worker.log"]
    assert "the worker has started" in (world.folder / job.id / "worker.log").read_text()


async def test_a_speculator_that_does_not_pay_is_published_switched_off(world: World) -> None:
    job = await world.job("slow")
    assert (await world.run(job)).state is JobState.SUCCEEDED
    version = await world.store.resolve("acme", parse_reference("slow"))
    assert (version.speculation.enabled, version.speculation.reason) == (False, "Expected speed-up 1.02.")
    assert "Published with speculation off: Expected speed-up 1.02." in await world.log(job)


@pytest.mark.parametrize(
    ("name", "rows", "code", "param", "says"),
    [
        ("bad-row", BAD_AT_17, "invalid_training_file", "training_file", "row 17"),
        ("oom", ROWS, "out_of_memory", "slipstream.micro_batch_size", "batch_size"),
        ("killed", ROWS, "worker_killed", None, "memory"),
        ("crash", ROWS, "worker_failed", None, "status 3"),
        ("silent", ROWS, "worker_failed", None, "no result"),
        ("refused", ROWS, "pickle_file", None, "refused"),
        ("elsewhere", ROWS, "bad_config", "adapter", "run/adapter holds no adapter."),
    ],
)
async def test_what_fails_says_why_and_publishes_nothing(
    world: World, name: str, rows: str, code: str, param: str | None, says: str
) -> None:
    job = await world.job(name, rows)
    done = await world.run(job)
    assert done.state is JobState.FAILED
    assert done.error is not None
    assert (done.error.code, done.error.param) == (code, param)
    assert says in done.error.message
    assert "secret" not in done.error.message
    assert str(world.folder) not in done.error.message
    assert (await world.log(job))[-1] == done.error.message
    await world.assert_nothing_published()
    assert await world.jobs.active() == []
    await world.jobs.delete_file("acme", job.training_file)


async def test_bad_rows_are_found_before_the_job_counts_as_running(world: World) -> None:
    states: list[JobState] = []
    update = world.jobs.update_job

    async def noting(tenant: str, job_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        job = await update(tenant, job_id, change)
        states.append(job.state)
        return job

    world.jobs.update_job = noting  # type: ignore[method-assign]
    await world.run(await world.job("bad-row", BAD_AT_17))
    assert list(dict.fromkeys(states)) == [JobState.VALIDATING_FILES, JobState.FAILED]


async def test_missing_content_is_told(world: World) -> None:
    job = await world.job("good")
    world.blobs.content.clear()
    done = await world.run(job)
    assert done.error is not None
    assert done.error.code == "file_unavailable"


@pytest.mark.parametrize("name", ["hang", "stubborn"])
async def test_cancelled_while_running(world: World, name: str) -> None:
    job = await world.job(name)
    running = asyncio.create_task(world.run(job))
    await world.until(job, lambda found: found.state is JobState.RUNNING)
    while not (await world.jobs.list_checkpoints("acme", job.id, PageQuery())).items:
        await asyncio.sleep(0.01)
    [worker] = trainers()
    await world.jobs.update_job("acme", job.id, lambda found: ask_to_cancel(found, utc_now()))
    done = await running
    assert done.state is JobState.CANCELLED
    assert not alive(worker)
    await world.assert_nothing_published()
    saved = (await world.jobs.list_checkpoints("acme", job.id, PageQuery())).items
    assert len(saved) == (2 if name == "hang" else 1)  # the polite one saved when it was asked to stop
    assert saved[-1].metrics == {"train_loss": 0.5, "valid_loss": 0.4}


async def test_cancelled_before_it_began(world: World) -> None:
    job = await world.job("good", cancel_requested=True)
    assert (await world.run(job)).state is JobState.CANCELLED
    await world.assert_nothing_published()


async def cancel_when(world: World, job: JobRecord, method: str, owner: Any) -> BaseException | None:
    """Run the job; ask to cancel it just before `owner.method` is called. What became of the asking."""
    wrapped: Callable[..., Awaitable[Any]] = getattr(owner, method)
    refusal: list[BaseException] = []

    async def asking(*args: Any, **more: Any) -> Any:
        setattr(owner, method, wrapped)
        try:
            await world.jobs.update_job("acme", job.id, lambda found: ask_to_cancel(found, utc_now()))
        except Exception as error:
            refusal.append(error)
        return await wrapped(*args, **more)

    setattr(owner, method, asking)
    await world.run(job)
    return refusal[0] if refusal else None


async def test_cancelling_before_publishing_wins_and_during_it_loses(world: World) -> None:
    early = await world.job("good")
    refusal = await cancel_when(world, early, "claim_blobs", world.store)
    assert "published" in str(refusal)
    assert (await world.jobs.get_job("acme", early.id)).state is JobState.SUCCEEDED

    late = await world.job("slow")
    add_event = world.jobs.add_event

    async def asking(tenant: str, job_id: str, event: Any) -> None:
        await add_event(tenant, job_id, event)
        if event.message.startswith("Step 3"):
            await world.jobs.update_job("acme", late.id, lambda found: ask_to_cancel(found, utc_now()))

    world.jobs.add_event = asking  # type: ignore[method-assign]
    assert (await world.run(late)).state is JobState.CANCELLED
    assert [summary.name for summary in await world.store.list("acme")] == ["good"]


async def test_an_attempt_that_was_taken_over_stops_and_publishes_nothing(world: World) -> None:
    job = await world.job("hang")
    running = asyncio.create_task(world.run(job))
    await world.until(job, lambda found: found.state is JobState.RUNNING)
    [worker] = trainers()
    await world.jobs.update_job("acme", job.id, lambda found: found.moved(JobState.QUEUED, heartbeat_at=None))
    assert (await running).state is JobState.QUEUED
    assert not alive(worker)
    assert len(await world.jobs.active()) == 1


async def test_an_attempt_that_is_not_the_newest_does_not_begin(world: World) -> None:
    job = await world.job("good")
    await world.jobs.update_job("acme", job.id, lambda found: found.changed(attempt=2))
    assert (await world.run(job)).state is JobState.QUEUED
    await world.assert_nothing_published()


async def test_it_tells_that_it_is_alive(world: World) -> None:
    job = await world.job("hang")
    running = asyncio.create_task(world.run(job))
    found = await world.until(job, lambda found: found.state is JobState.RUNNING)
    for _ in range(3):
        before = found.heartbeat_at
        found = await world.until(job, lambda found, before=before: found.heartbeat_at != before)  # type: ignore[misc]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert trainers() == set()


async def test_a_second_attempt_goes_on_from_the_checkpoint(world: World) -> None:
    job = await world.job("hang-once")
    running = asyncio.create_task(world.run(job))
    await world.until(job, lambda found: found.state is JobState.RUNNING)
    kept = world.folder / job.id / "run" / "checkpoint"
    kept.mkdir(parents=True)
    requeue = {"heartbeat_at": None}
    await world.jobs.update_job("acme", job.id, lambda found: found.moved(JobState.QUEUED, **requeue))
    await running
    assert kept.is_dir()
    again = {"attempt": 2, "heartbeat_at": utc_now()}
    second = await world.jobs.update_job("acme", job.id, lambda found: found.changed(**again))
    assert (await world.run(second)).state is JobState.SUCCEEDED


async def test_an_outage_of_the_registry_is_sat_out(world: World) -> None:
    calls = 0
    update, publish = world.jobs.update_job, world.store.publish

    async def failing_update(*args: Any) -> JobRecord:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise StoreUnavailable("away")
        return await update(*args)

    async def failing_publish(draft: Any) -> tuple[AdapterVersion, bool]:
        world.store.publish = publish  # type: ignore[method-assign]
        await publish(draft)
        raise StoreUnavailable("the answer was lost")

    world.jobs.update_job = failing_update  # type: ignore[assignment,method-assign]
    world.store.publish = failing_publish  # type: ignore[method-assign]
    done = await world.run(await world.job("good"))
    assert (done.state, done.fine_tuned_model) == (JobState.SUCCEEDED, "good@1")
    assert len((await world.store.get("acme", "good")).versions) == 1


async def test_an_outage_that_lasts_ends_the_attempt(tmp_path: Path) -> None:
    world = World(tmp_path, outage_s=0.1)

    async def away(*_: Any) -> None:
        raise StoreUnavailable("away")

    world.blobs.fetch_file = away  # type: ignore[assignment,method-assign]
    done = await world.run(await world.job("good"))
    assert done.state is JobState.FAILED


async def test_the_adapter_to_speed_up_is_fetched(world: World) -> None:
    digest = "sha256:" + "0" * 64
    job = await world.job("good", adapter="sql@1", adapter_digest=digest, options={"method": "turbo"})
    assert (await world.run(job)).state is JobState.SUCCEEDED
    assert world.fetched == [AdapterRef("acme", digest)]


async def test_an_unforeseen_error_ends_the_job(world: World) -> None:
    async def broken() -> Path:
        raise RuntimeError("secret")

    world.bench = replace(world.bench, base_path=broken)
    done = await world.run(await world.job("good"))
    assert done.error is not None
    assert (done.error.code, "secret" in done.error.message) == ("internal_error", False)


async def test_an_expected_error_keeps_its_sentence(world: World) -> None:
    async def refused() -> Path:
        raise AdapterRejected("no good", code="x")

    world.bench = replace(world.bench, base_path=refused)
    done = await world.run(await world.job("good"))
    assert done.error is not None
    assert done.error.code == "x"


def test_the_worker_dies_with_its_supervisor(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(WORKER.parents[2] / "platform")!r})
from slipstream.training.worker_process import WorkerProcess
worker = WorkerProcess(["sleep", "600"], Path({str(tmp_path / "log")!r}))
print(worker._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    assert eventually(lambda: not alive(pid))


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.read() == []
    with path.open("w") as file:
        file.write('{"a": 1}\nnonsense\n[1]\n{"b"')
        file.flush()
        assert tail.read() == [{"a": 1}]
        file.write(": 2}\n")
        file.flush()
        assert tail.read() == [{"b": 2}]
