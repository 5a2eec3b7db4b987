"""Training jobs on a real Ray, a real Redis and a real disk; only the trainer is a script."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import ray
from pydantic import SecretStr
from support.api_app import write_adapter
from support.jobs import claimed, file_record, job_record
from support.processes import alive, command, descendants, eventually
from support.redis_server import RedisServer, running_redis

from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.jobs import JobRecord, JobState, PageQuery, ask_to_cancel
from adapter_registry.records import parse_reference, utc_now
from adapter_registry.redis_jobs import RedisJobs
from adapter_registry.redis_store import RedisStore
from deployments.training_jobs import NAMESPACE, RayJobRunner, TrainingPlan, actor_name, remove_abandoned
from slipstream.protocol import BaseModelSpec
from slipstream.testing import FAKE_BASE
from slipstream.training.jobs import Rounds

pytestmark = [pytest.mark.ray, pytest.mark.redis]
ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "support" / "scripted_worker.py"
ROWS = '{"prompt": "1+1=", "completion": "2"}\n' * 16


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    with tempfile.TemporaryDirectory(prefix="slip-ray-") as scratch:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            _temp_dir=scratch,
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


class World:
    """A gateway's view, without HTTP."""

    def __init__(self, folder: Path, url: str) -> None:
        self.base = folder / "base"
        write_adapter(self.base / "finished")
        (self.base / "config.json").write_text("{}")
        (self.base / "model.safetensors").touch()
        self.url, self.folder = url, folder
        self.blob_url = f"file://{folder / 'blobs'}"
        self.store, self.jobs = RedisStore.from_url(url), RedisJobs.from_url(url)
        self.blobs = ObstoreBlobs.from_url(self.blob_url)
        self.rounds = self.gateway()

    def gateway(self, **plan: object) -> Rounds:
        """The rounds of a gateway that has just started."""
        fields = {
            "redis_url": SecretStr(self.url),
            "blob_url": self.blob_url,
            "home": self.folder / "home",
            "base_models": {FAKE_BASE.id: str(self.base)},
            "adapter_cache_bytes": 1 << 20,
            "command": (sys.executable, str(WORKER)),
            "heartbeat_s": 0.2,
            **plan,
        }
        self.runner = RayJobRunner(TrainingPlan(**fields))  # type: ignore[arg-type]

        async def base(model: str) -> BaseModelSpec:
            return FAKE_BASE

        return Rounds(jobs=self.jobs, store=self.store, runner=self.runner, base=base, stale_s=3.0)

    async def job(self, name: str, rows: str = ROWS) -> JobRecord:
        file = await claimed(self.store, file_record(rows))
        await self.blobs.put_bytes("acme", file.sha256, rows.encode())
        await self.jobs.add_file(file)
        job = job_record(file, name=name, model=FAKE_BASE.id)
        await self.jobs.add_job(job)
        return job

    async def found(self, job: JobRecord) -> JobRecord:
        return await self.jobs.get_job("acme", job.id)

    async def until(self, job: JobRecord, condition: Callable[[JobRecord], bool], timeout_s: float = 60) -> JobRecord:
        """Make rounds until the job is as wanted."""
        async with asyncio.timeout(timeout_s):
            while not condition(found := await self.found(job)):
                await self.rounds.make()
                await asyncio.sleep(0.1)
        return found

    async def ended(self, job: JobRecord) -> JobRecord:
        return await self.until(job, lambda found: found.state.is_terminal)

    async def running(self, job: JobRecord) -> int:
        """Wait until the job's trainer has saved a checkpoint; its process id."""
        await self.until(job, lambda found: found.state is JobState.RUNNING)
        async with asyncio.timeout(20):
            while not (await self.jobs.list_checkpoints("acme", job.id, PageQuery())).items:
                await asyncio.sleep(0.1)
        return worker_of(job)

    async def assert_nothing_published(self, name: str) -> None:
        assert name not in [summary.name for summary in await self.store.list("acme")]

    async def assert_no_actor(self, job: JobRecord) -> None:
        async with asyncio.timeout(20):
            while await self.runner.holds(job):
                await asyncio.sleep(0.1)


def worker_of(job: JobRecord) -> int:
    """The process id of a job's trainer."""
    [found] = [pid for pid in descendants(os.getpid()) if f"{job.id}/config.json" in command(pid)]
    return found


def actor_of(job: JobRecord) -> int:
    """The process id of a job's actor: the parent of its trainer."""
    return int(Path(f"/proc/{worker_of(job)}/stat").read_text().rpartition(")")[2].split()[1])


@pytest_asyncio.fixture
async def world(tmp_path: Path, redis: RedisServer) -> AsyncIterator[World]:
    made = World(tmp_path, redis.url)
    yield made
    for job in await made.jobs.active():
        await made.runner.stop(job)
        await made.jobs.retire(job)
    await made.jobs.close()
    await made.store.close()


async def test_a_job_succeeds_and_its_adapter_is_published(world: World) -> None:
    job = await world.job("good")
    done = await world.ended(job)
    assert done.error is None
    assert (done.state, done.fine_tuned_model) == (JobState.SUCCEEDED, "good@1")
    version = await world.store.resolve("acme", parse_reference("good@1"))
    for file in version.files:
        assert await world.blobs.exists("acme", file.sha256)
    await world.assert_no_actor(done)
    assert await world.jobs.active() == []


async def test_jobs_wait_for_their_turn(world: World) -> None:
    first, second = await world.job("hang"), await world.job("good")
    await world.running(first)
    for _ in range(5):
        await world.rounds.make()
    assert (await world.found(second)).state is JobState.QUEUED
    await world.jobs.update_job("acme", first.id, lambda found: ask_to_cancel(found, utc_now()))
    assert (await world.ended(first)).state is JobState.CANCELLED
    assert (await world.ended(second)).state is JobState.SUCCEEDED


async def test_cancelled_while_running(world: World) -> None:
    job = await world.job("hang")
    worker = await world.running(job)
    await world.jobs.update_job("acme", job.id, lambda found: ask_to_cancel(found, utc_now()))
    done = await world.ended(job)
    assert done.state is JobState.CANCELLED
    assert not alive(worker)
    await world.assert_nothing_published("hang")
    await world.assert_no_actor(done)


@pytest.mark.parametrize(
    ("name", "rows", "code", "says"),
    [
        ("bad-row", ROWS + '{"prompt": "1+1="}\n', "invalid_training_file", "row 17"),
        ("oom", ROWS, "out_of_memory", "memory"),
        ("crash", ROWS, "worker_failed", "status 3"),
    ],
)
async def test_failing_says_why(world: World, name: str, rows: str, code: str, says: str) -> None:
    job = await world.job(name, rows)
    done = await world.ended(job)
    assert done.state is JobState.FAILED
    assert done.error is not None
    assert done.error.code == code
    assert says in done.error.message
    await world.assert_nothing_published(name)


async def test_a_trainer_that_is_killed_from_outside(world: World) -> None:
    job = await world.job("hang")
    os.kill(await world.running(job), signal.SIGKILL)
    done = await world.ended(job)
    assert done.error is not None
    assert (done.state, done.error.code) == (JobState.FAILED, "worker_killed")
    await world.assert_nothing_published("hang")


async def test_an_actor_that_is_killed_twice(world: World) -> None:
    job = await world.job("hang")
    for attempt in (1, 2):
        await world.until(job, lambda found, wanted=attempt: found.attempt == wanted)  # type: ignore[misc]
        worker = await world.running(job)
        os.kill(actor_of(job), signal.SIGKILL)
        assert eventually(lambda pid=worker: not alive(pid))  # type: ignore[misc]
        await world.until(job, lambda found: found.state is not JobState.RUNNING)
    done = await world.ended(job)
    assert done.error is not None
    assert (done.state, done.error.code) == (JobState.FAILED, "worker_lost")
    await world.assert_nothing_published("hang")
    assert await world.jobs.active() == []


async def test_a_lost_job_goes_on_and_succeeds(world: World) -> None:
    job = await world.job("hang-once")
    await world.running(job)
    os.kill(actor_of(job), signal.SIGKILL)
    await world.until(job, lambda found: found.state is not JobState.RUNNING)
    done = await world.ended(job)
    assert (done.state, done.attempt, done.fine_tuned_model) == (JobState.SUCCEEDED, 2, "hang-once@1")


async def test_a_gateway_that_restarts_finds_its_jobs_running(world: World) -> None:
    job = await world.job("hang")
    worker = await world.running(job)
    await world.jobs.close()
    world.jobs = RedisJobs.from_url(world.url)
    world.rounds = world.gateway()
    before = await world.found(job)
    after = await world.until(job, lambda found: found.heartbeat_at != before.heartbeat_at)
    assert (after.state, after.attempt) == (JobState.RUNNING, 1)
    assert alive(worker)
    assert await world.runner.holds(after)
    await world.jobs.update_job("acme", job.id, lambda found: ask_to_cancel(found, utc_now()))
    assert (await world.ended(job)).state is JobState.CANCELLED


async def test_a_job_without_resources_waits(world: World) -> None:
    world.rounds = world.gateway(cpus=100.0)
    job = await world.job("good")
    await world.until(job, lambda found: found.attempt == 1)
    await asyncio.sleep(3.5)
    for _ in range(3):
        await world.rounds.make()
    found = await world.found(job)
    assert (found.state, found.attempt) == (JobState.QUEUED, 1)
    events = (await world.jobs.list_events("acme", job.id, PageQuery())).items
    assert any("Waiting for a machine" in event.message for event in events)
    await world.jobs.update_job("acme", job.id, lambda found: ask_to_cancel(found, utc_now()))
    assert (await world.ended(job)).state is JobState.CANCELLED
    await world.assert_no_actor(found)


async def test_starting_twice_is_starting_once(world: World) -> None:
    job = (await world.job("hang")).model_copy(update={"attempt": 1, "heartbeat_at": utc_now()})
    await world.jobs.update_job("acme", job.id, lambda found: found.changed(attempt=1, heartbeat_at=utc_now()))
    await asyncio.gather(*(world.runner.start(job, FAKE_BASE) for _ in range(4)))
    await world.running(job)
    assert ray.get_actor(actor_name(job), namespace=NAMESPACE) is not None


def test_old_job_folders_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "ftjob-old", tmp_path / "ftjob-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "worker.log").touch()
    for path in (old / "worker.log", old):
        os.utime(path, (1, 1))
    remove_abandoned(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)
