"""One attempt at a job: fetch its files, run the trainer in a process of its own, tell the store how it goes, publish.

Torch-free and Ray-free: `deployments.training_jobs` gives it a process to live in. Whatever the trainer's process does
(run out of memory, be killed, hang), the job ends in one terminal state with a sentence that says why. Publishing happens
here, once, after `publishing` was set and before the job ends: cancelling before it wins, cancelling after it is refused.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapter_registry.errors import BlobCorrupt, BlobMissing, NotPublished, StoreUnavailable
from adapter_registry.jobs import (
    CHECKPOINT_PREFIX,
    Checkpoint,
    IllegalTransition,
    JobError,
    JobEvent,
    JobRecord,
    JobState,
    JobStore,
    new_id,
)
from adapter_registry.records import AdapterVersion, Lineage, SpeculationPolicy, VersionWish, utc_now
from adapter_registry.store import BlobStore, Store
from slipstream.errors import AdapterRejected, SlipstreamError
from slipstream.protocol import AdapterRef, BaseModelSpec
from slipstream.publishing import publish_folder
from slipstream.training.config import TrainingOptions
from slipstream.training.jobs import Superseded, job_event
from slipstream.training.options import DATA_FILE, VALIDATION_FILE, JobFolder, job_config
from slipstream.training.worker_process import EventTail, WorkerProcess

log = logging.getLogger("slipstream.training")
T = TypeVar("T")
_READING = "Preparing"  # the trainer's first phase: rows are read, and the model is loaded
SIGTERM_STATUS = 128 + signal.SIGTERM
_KILLED = JobError(
    code="worker_killed",
    message="The training process was killed. Its machine may have run out of memory: lower 'batch_size', "
    "'micro_batch_size' or 'max_length', or set 'gradient_checkpointing'.",
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a supervisor works with. Whoever builds it owns and closes the stores."""

    jobs: JobStore
    store: Store
    blobs: BlobStore
    fetch_adapter: Callable[[AdapterRef, Path], Awaitable[None]]
    base_path: Callable[[], Awaitable[Path]]  # the base model's folder on this machine, fetched if need be
    folder: Path  # of all jobs; the same on every machine where a lost job is to go on from its checkpoint
    command: Sequence[str]  # the trainer; the path of its configuration is added
    threads: int = 1
    device: str = "auto"
    poll_s: float = 0.25
    heartbeat_s: float = 3.0
    grace_s: float = 30.0  # between SIGTERM and SIGKILL: time to save a checkpoint
    outage_s: float = 900.0  # how long the registry may be away before the attempt gives up


@dataclass(slots=True)
class _Seen:
    """What the worker has said so far."""

    result: dict[str, Any] | None = None
    error: JobError | None = None
    trains: bool = False


@dataclass(slots=True)
class JobSupervisor:
    """One attempt. `run` ends when the job has ended, or when somebody else has taken it over."""

    job: JobRecord  # as this attempt last saw it
    base: BaseModelSpec
    bench: Bench
    _seen: _Seen = field(default_factory=_Seen)
    _phase_began: datetime | None = None  # the worker's present phase
    _next_beat: float = 0.0
    _stopping: bool = False

    async def run(self) -> None:
        """See the attempt through."""
        folder = JobFolder(self.bench.folder, self.job.id)
        try:
            await self._update(lambda job: job.moved(JobState.VALIDATING_FILES, started_at=job.started_at or utc_now()))
            await self._say("The training job has started; its files are being read.")
            await self._end_as(await self._attempt(folder))
        except (Superseded, IllegalTransition, NotPublished):
            log.info("job %s attempt %d is not ours any more", self.job.id, self.job.attempt)
            return
        await self._patiently(lambda: self.bench.jobs.retire(self.job))
        await asyncio.to_thread(_keep_the_log_only, folder)

    async def _attempt(self, folder: JobFolder) -> AdapterVersion | JobError | None:
        """The published version, why there is none, or None when it was cancelled."""
        try:
            if self.job.cancel_requested:
                return None
            await self._beating(self._prepare(folder))  # a base model that is fetched first takes minutes
            status = await self._train(folder)
            return await self._outcome(status, folder)
        except (Superseded, IllegalTransition, NotPublished):
            raise
        except (BlobMissing, BlobCorrupt):
            return JobError(code="file_unavailable", message="The job's files could not be read. Upload them again.")
        except AdapterRejected as error:
            return JobError(code=error.code, message=f"The trained adapter was refused: {error}")
        except SlipstreamError as error:
            return JobError(code=error.code, message=str(error), param=getattr(error, "param", None))
        except Exception:  # the attempt's top loop: the job must end, and say that it is our fault
            log.exception("job %s failed", self.job.id)
            return JobError(code="internal_error", message="Something went wrong on our side. Create the job again.")

    async def _prepare(self, folder: JobFolder) -> None:
        bench, job = self.bench, self.job
        await asyncio.to_thread(folder.path.mkdir, parents=True, exist_ok=True)
        files: dict[str, Path] = {}
        for stem, file_id in ((DATA_FILE, job.training_file), (VALIDATION_FILE, job.validation_file)):
            if file_id is not None:
                files[stem] = await self._patiently(partial(self._fetch, folder, stem, file_id))
        if job.adapter_digest is not None:
            await bench.fetch_adapter(AdapterRef(job.tenant, job.adapter_digest), folder.adapter)
        config = job_config(job, folder, await bench.base_path(), files, bench.threads, bench.device)
        await asyncio.to_thread(folder.config.write_text, config.model_dump_json(indent=2), "utf-8")
        await asyncio.to_thread(folder.events.unlink, missing_ok=True)  # an earlier attempt's

    async def _fetch(self, folder: JobFolder, stem: str, file_id: str) -> Path:
        record = await self.bench.jobs.get_file(self.job.tenant, file_id)
        target = folder.data(stem, record.filename)
        await self.bench.blobs.fetch_file(record.tenant, record.sha256, target)
        return target

    async def _train(self, folder: JobFolder) -> int:
        """Run the worker to its end; its exit status, negative for a signal."""
        tail = EventTail(folder.events)
        worker = WorkerProcess([*self.bench.command, str(folder.config)], folder.log)
        try:
            while True:
                ended = await worker.wait(self.bench.poll_s)
                for event in await asyncio.to_thread(tail.read):
                    await self._take(event)
                if ended is not None:
                    return ended
                await self._beat()
                if self.job.cancel_requested and not self._stopping:
                    self._stopping = True
                    worker.stop(self.bench.grace_s)
        finally:
            await worker.kill()

    async def _beat(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._next_beat:
            return
        self._next_beat = now + self.bench.heartbeat_s
        await self._update(lambda job: job)

    async def _outcome(self, status: int, folder: JobFolder) -> AdapterVersion | JobError | None:
        seen = self._seen
        if self._stopping:
            return None
        if seen.error is not None:
            return seen.error
        if status == 0 and seen.result is not None:
            return await self._publish(seen.result)
        log.warning("job %s: the worker ended with status %d; its log is %s", self.job.id, status, folder.log)
        if status in (-signal.SIGKILL, -signal.SIGTERM, SIGTERM_STATUS):
            return _KILLED
        return JobError(
            code="worker_failed",
            message=f"The training process ended with status {status} and no result. The server's log has the reason.",
        )

    async def _publish(self, result: dict[str, Any]) -> AdapterVersion | None:
        await self._now_trains()
        await self._update(lambda job: job if job.cancel_requested else job.changed(publishing=True))
        if not self.job.publishing:
            return None
        gate = result.get("gate") or {}
        policy = SpeculationPolicy(enabled=bool(gate.get("speculation", True)), reason=str(gate.get("reason", "")))
        wish = VersionWish(speculation=policy, lineage=await self._lineage(result))
        publishing = self._patiently(
            lambda: publish_folder(
                Path(result["folder"]),
                self.job.name,
                self.job.tenant,
                self.base,
                store=self.bench.store,
                blobs=self.bench.blobs,
                created_by=self.job.id,  # so that a version whose supervisor was lost is known to be this job's
                wish=wish,
            )
        )
        version, _ = await self._beating(publishing)
        if not policy.enabled:
            await self._say(f"Published with speculation off: {policy.reason}", "warn")
        return version

    async def _lineage(self, result: dict[str, Any]) -> Lineage:
        job = self.job
        data = await self._patiently(lambda: self.bench.jobs.get_file(job.tenant, job.training_file))
        measured = {"expected_speedup": (result.get("gate") or {}).get("expected_speedup")} | {
            name: value for name, value in (result.get("metrics") or {}).items() if name.startswith("eval_")
        }
        return Lineage(
            training_job=job.id,
            parent=job.adapter or "",
            data_sha256=data.sha256,
            evaluation={name: float(value) for name, value in measured.items() if value is not None},
        )

    async def _beating(self, work: Awaitable[T]) -> T:
        """Wait for `work` without falling silent: a large upload may take longer than a heartbeat may be away."""
        running = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({running}, timeout=self.bench.heartbeat_s))[0]:
                await self._beat()
            return running.result()
        finally:
            running.cancel()

    async def _end_as(self, end: AdapterVersion | JobError | None) -> None:
        if isinstance(end, JobError):
            await self._update(lambda job: job.moved(JobState.FAILED, error=end, finished_at=utc_now()))
            await self._say(end.message, "error")
        elif end is None:
            await self._update(lambda job: job.moved(JobState.CANCELLED, finished_at=utc_now()))
            await self._say("The job was cancelled.")
        else:
            tokens = (self._seen.result or {}).get("tokens")
            done: dict[str, Any] = {"fine_tuned_model": end.ref, "trained_tokens": tokens, "finished_at": utc_now()}
            await self._update(lambda job: job.moved(JobState.SUCCEEDED, **done))
            await self._say(f"Published {end.ref}.")

    async def _take(self, event: dict[str, Any]) -> None:
        """One line of the worker's."""
        kind, now = event.get("type"), utc_now()
        if kind == "phase":
            self._phase_began = now  # progress begins anew
            if event.get("phase") != _READING:
                await self._now_trains()
            await self._say(f"{event.get('phase')} …")
        elif kind == "message":
            level = {"warning": "warn", "error": "error"}.get(str(event.get("level")), "info")
            await self._tell(job_event(str(event.get("message")), level, now))  # type: ignore[arg-type]
        elif kind == "metrics":
            await self._now_trains()
            await self._estimate(event)
            data = {"step": event.get("step"), "total": event.get("total"), **(event.get("data") or {})}
            told = job_event(_metrics_line(event), "info", now)
            await self._tell(told.model_copy(update={"type": "metrics", "data": data}))
        elif kind == "checkpoint":
            await self._checkpoint(event)
        elif kind == "result":
            self._seen.result = event
        elif kind == "error":
            self._seen.error = _error_of(event, JobFolder(self.bench.folder, self.job.id))

    async def _now_trains(self) -> None:
        if not self._seen.trains:
            self._seen.trains = True
            await self._update(lambda job: job.moved(JobState.RUNNING))

    async def _estimate(self, event: dict[str, Any]) -> None:
        progress, began = event.get("progress") or 0.0, self._phase_began
        if began is None or not 0 < progress <= 1:
            return
        finish = began + (utc_now() - began) / progress  # of this phase: how long later ones take is not known
        known = self.job.estimated_finish
        if known is None or abs(finish - known) > timedelta(seconds=5):
            await self._update(lambda job: job.changed(estimated_finish=finish))

    async def _checkpoint(self, event: dict[str, Any]) -> None:
        step, job = int(event.get("step") or 0), self.job
        saved = Checkpoint(
            id=new_id(CHECKPOINT_PREFIX),
            created_at=utc_now(),
            step=step,
            metrics=event.get("data") or {},
            fine_tuned_model_checkpoint=f"{job.name}:ckpt-step-{step}",
        )
        await self._patiently(lambda: self.bench.jobs.add_checkpoint(job.tenant, job.id, saved))
        await self._say(f"Checkpoint saved at step {step}.")

    async def _say(self, message: str, level: Any = "info") -> None:
        await self._tell(job_event(message, level))

    async def _tell(self, event: JobEvent) -> None:
        await self._patiently(lambda: self.bench.jobs.add_event(self.job.tenant, self.job.id, event))

    async def _update(self, change: Callable[[JobRecord], JobRecord]) -> None:
        """Change the job, with a heartbeat, as long as it is this attempt's. Raises `Superseded`."""
        attempt = self.job.attempt

        def ours(found: JobRecord) -> JobRecord:
            if found.attempt != attempt or found.state.is_terminal or found.heartbeat_at is None:
                raise Superseded
            changed = change(found)
            return changed if changed.state.is_terminal else changed.changed(heartbeat_at=utc_now())

        self.job = await self._patiently(lambda: self.bench.jobs.update_job(self.job.tenant, self.job.id, ours))

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Try again while the registry is away: an hour's training must not be lost to a minute's outage."""
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + self.bench.outage_s, 0.2
        while True:
            try:
                return await call()
            except StoreUnavailable:
                if loop.time() + pause_s > deadline:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 10.0)


def _error_of(event: dict[str, Any], folder: JobFolder) -> JobError:
    """The worker's last word. The trainer knows the job's files as `data` and `valid`, and where they lie here."""
    message, param = str(event.get("message") or "The training failed."), event.get("param")
    message = message.replace(f"{folder.path}/", "")  # where is nobody's business but ours
    if event.get("code") == "invalid_training_file":
        param = VALIDATION_FILE if message.startswith(f"{VALIDATION_FILE}.") else DATA_FILE
    elif param in TrainingOptions.model_fields:
        param = f"slipstream.{param}"
    return JobError(code=str(event.get("code") or "training_failed"), message=message, param=param)


def _metrics_line(event: dict[str, Any]) -> str:
    shown = ", ".join(f"{name}={value:.4g}" for name, value in (event.get("data") or {}).items())
    total = event.get("total")
    return f"Step {event.get('step')}{f'/{total}' if total else ''}{': ' if shown else ''}{shown}"


def _keep_the_log_only(folder: JobFolder) -> None:
    """The rest is published, or of no more use."""
    for path in folder.path.glob("*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != folder.log:
            path.unlink(missing_ok=True)
