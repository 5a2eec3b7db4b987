"""Training files and jobs: records, the one table of what may follow what, and the seam `JobStore`.

Real twin: `adapter_registry.redis_jobs.RedisJobs`. Public fake: `slipstream.testing.MemoryJobs`. Both run the same
suite in `tests/contract`.

A file's content is a blob of its tenant, in the same `BlobStore` as adapters' files and counted by the same references:
uploading is `Store.claim_blobs` → `BlobStore.put_file` → `add_file`, and a file that is deleted leaves garbage which the
registry's sweep frees after its grace period. A second place with its own rules would need a second answer to "the same
content is uploaded while its last file is deleted"; this one has it already.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Generic, Literal, Protocol, TypeVar

from pydantic import Field, JsonValue, StringConstraints

from adapter_registry.errors import InUse, NotPublished, RegistryError
from adapter_registry.records import Digest, Frozen, Name, Sha256

T = TypeVar("T")
FILE_PREFIX, JOB_PREFIX, EVENT_PREFIX, CHECKPOINT_PREFIX = "file-", "ftjob-", "ftevent-", "ftckpt_"
MAX_EVENTS = 10_000  # kept per job; older ones go
MAX_CHECKPOINTS = 1_000

FileId = Annotated[str, StringConstraints(pattern=r"^file-[0-9a-f]{24}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^ftjob-[0-9a-f]{24}$")]


class JobState(StrEnum):
    """Where a job stands, in OpenAI's words."""

    QUEUED = "queued"  # waits for a free place among the jobs that run at once
    VALIDATING_FILES = "validating_files"  # its worker has started and reads the rows
    RUNNING = "running"  # it trains, or publishes what it has trained
    SUCCEEDED = "succeeded"  # `fine_tuned_model` answers requests
    FAILED = "failed"  # `error` says why
    CANCELLED = "cancelled"  # by its tenant

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can follow."""
        return not NEXT_STATES[self]


_ENDED_EARLY = frozenset({JobState.FAILED, JobState.CANCELLED})
# A job whose worker was lost goes back to QUEUED for another attempt.
NEXT_STATES: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: _ENDED_EARLY | {JobState.VALIDATING_FILES},
    JobState.VALIDATING_FILES: _ENDED_EARLY | {JobState.RUNNING, JobState.QUEUED},
    JobState.RUNNING: _ENDED_EARLY | {JobState.SUCCEEDED, JobState.QUEUED},
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class IllegalTransition(RegistryError):
    """A job was told to do what cannot follow its state; `state` is where it stands."""

    def __init__(self, job: JobRecord, wanted: str) -> None:
        super().__init__(f"The job {job.id} is {job.state}, so it cannot be {wanted}.")
        self.state = job.state


class FileRecord(Frozen):
    """An uploaded data file; its content is the blob `sha256` of the tenant."""

    id: FileId
    tenant: Name
    filename: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    purpose: Literal["fine-tune"]
    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Sha256
    created_at: datetime


class Hyperparameters(Frozen):
    """OpenAI's three; "auto" leaves the choice to the trainer's defaults."""

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Literal["auto"] = "auto"


class JobError(Frozen):
    """Why a job failed: a stable code, a sentence for people, and the field that is to blame, if one is."""

    code: str
    message: str
    param: str | None = None


class JobRecord(Frozen):
    """One fine-tuning job."""

    id: JobId
    tenant: Name
    name: Name  # of the adapter that it publishes
    suffix: str | None = None
    model: str  # id of the base model
    training_file: FileId
    validation_file: FileId | None = None
    method: Literal["supervised"] = "supervised"
    hyperparameters: Hyperparameters = Hyperparameters()
    options: dict[str, JsonValue] = Field(
        default_factory=dict
    )  # the body's `slipstream`, validated by slipstream.training.options
    adapter: str | None = None  # `name@version` that a speculator is trained for, if not for the base itself
    adapter_digest: Digest | None = None  # of that version
    seed: int
    metadata: dict[str, str] = Field(default_factory=dict)
    created_by: str = ""  # key id
    created_at: datetime
    state: JobState = JobState.QUEUED
    attempt: Annotated[int, Field(ge=0)] = 0  # counts starts; a worker of an earlier attempt may change nothing
    started_at: datetime | None = None
    finished_at: datetime | None = None
    estimated_finish: datetime | None = None
    heartbeat_at: datetime | None = None  # by the clock of the machine that trains
    cancel_requested: bool = False
    publishing: bool = False  # from here on it is too late to cancel
    fine_tuned_model: str | None = None  # `name@version`
    trained_tokens: int | None = None
    error: JobError | None = None
    result_files: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Ids of the files it reads."""
        return (self.training_file, *([self.validation_file] if self.validation_file else []))

    def moved(self, state: JobState, **changes: object) -> JobRecord:
        """This job in another state. Raises `IllegalTransition`."""
        if state not in NEXT_STATES[self.state]:
            raise IllegalTransition(self, state)
        return self.changed(state=state, **changes)

    def changed(self, **changes: object) -> JobRecord:
        """This job with other fields, validated. Raises `IllegalTransition` when it has ended."""
        if self.state.is_terminal:
            raise IllegalTransition(self, "changed")
        return JobRecord.model_validate({**self.model_dump(), **changes})


class JobEvent(Frozen):
    """A line of a job's log, or its metrics at a step."""

    id: str
    created_at: datetime
    level: Literal["info", "warn", "error"] = "info"
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, JsonValue] | None = None


class Checkpoint(Frozen):
    """What the trainer saved at a step, to go on from if its worker is lost. It is not served."""

    id: str
    created_at: datetime
    step: Annotated[int, Field(ge=0)]
    metrics: dict[str, float] = Field(default_factory=dict)
    fine_tuned_model_checkpoint: str  # a label, as OpenAI writes it: `name:ckpt-step-20`


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Where a listing starts and how far it goes. `after` is the id of the last item of the page before."""

    after: str | None = None
    limit: int = 20
    newest_first: bool = True


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a listing."""

    items: Sequence[T]
    has_more: bool


class JobStore(Protocol):
    """Files and jobs. Other tenants' look like unknown ones: `NotPublished`."""

    async def add_file(self, file: FileRecord) -> None:
        """Make an uploaded file visible. Raises `BlobMissing` unless its content was claimed and put, and `StorageFull`."""
        ...

    async def get_file(self, tenant: str, file_id: str) -> FileRecord:
        """Raises `NotPublished`."""
        ...

    async def list_files(self, tenant: str, query: PageQuery) -> Page[FileRecord]:
        """In order of arrival. Raises `NotPublished` when `after` is not in the list."""
        ...

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Raises `NotPublished`, and `InUse` while a job that has not ended reads it."""
        ...

    async def add_job(self, job: JobRecord) -> None:
        """Keep a new job and protect its files, in one step. Raises `NotPublished` when a file is not there."""
        ...

    async def get_job(self, tenant: str, job_id: str) -> JobRecord:
        """Raises `NotPublished`."""
        ...

    async def list_jobs(self, tenant: str, query: PageQuery) -> Page[JobRecord]:
        """In order of creation. Raises `NotPublished` when `after` is not in the list."""
        ...

    async def update_job(self, tenant: str, job_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Replace a job by what `change` makes of it, unless somebody else changed it in between: then again.

        `change` may run several times, so it decides on what it is given and nothing else. The store checks every step
        against `NEXT_STATES`, whatever `change` did. A job that ends lets go of its files in the same step. Raises
        `NotPublished` and `IllegalTransition`, and whatever `change` raises.
        """
        ...

    async def add_event(self, tenant: str, job_id: str, event: JobEvent) -> None:
        """Append to the job's log; an event whose id is there already is not added again."""
        ...

    async def list_events(self, tenant: str, job_id: str, query: PageQuery) -> Page[JobEvent]:
        """Raises `NotPublished`."""
        ...

    async def add_checkpoint(self, tenant: str, job_id: str, checkpoint: Checkpoint) -> None:
        """As `add_event`."""
        ...

    async def list_checkpoints(self, tenant: str, job_id: str, query: PageQuery) -> Page[Checkpoint]:
        """Raises `NotPublished`."""
        ...

    async def active(self) -> Sequence[JobRecord]:
        """Every tenant's jobs that were not retired, in order of creation."""
        ...

    async def take_slot(self, job: JobRecord, limit: int) -> bool:
        """Whether `job` is among the at most `limit` jobs that run at once, now or already."""
        ...

    async def retire(self, job: JobRecord) -> None:
        """The job has ended and its worker is gone: free its slot and leave it out of `active`."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


def new_id(prefix: str) -> str:
    """A fresh id: the prefix and 96 random bits in hex."""
    return prefix + secrets.token_hex(12)


def check_step(before: JobRecord, after: JobRecord) -> JobRecord:
    """Return `after` if it may replace `before`; else raise `IllegalTransition`."""
    if (before.id, before.tenant, before.files) != (after.id, after.tenant, after.files):
        raise ValueError("A job's id, tenant and files never change.")
    if before.state.is_terminal and before != after:
        raise IllegalTransition(before, "changed")
    if after.state is not before.state and after.state not in NEXT_STATES[before.state]:
        raise IllegalTransition(before, after.state)
    return after


def ask_to_cancel(job: JobRecord, now: datetime) -> JobRecord:
    """A change for `update_job`: a job that waits ends at once, one that runs is told to stop.

    Raises `IllegalTransition` when it has ended or is publishing: cancelling comes too late then.
    """
    if job.state.is_terminal:
        raise IllegalTransition(job, "cancelled")
    if job.publishing:
        raise IllegalTransition(job, "cancelled: its adapter is being published")
    if job.state is JobState.QUEUED and job.attempt == 0:
        return job.moved(JobState.CANCELLED, cancel_requested=True, finished_at=now)
    return job.changed(cancel_requested=True)


def no_file(file_id: str) -> NotPublished:
    """The same text for an unknown file and another tenant's."""
    return NotPublished(f"There is no file {file_id[:80]!r}: GET /v1/files lists yours.")


def no_job(job_id: str) -> NotPublished:
    """The same text for an unknown job and another tenant's."""
    return NotPublished(f"There is no fine-tuning job {job_id[:80]!r}: GET /v1/fine_tuning/jobs lists yours.")


def not_in_list(after: str) -> NotPublished:
    """A cursor that points at nothing."""
    return NotPublished(f"{after[:80]!r} is not in this list: 'after' is the id of the last item of the page before.")


def in_use(file_id: str) -> InUse:
    """A file that a job reads."""
    return InUse(f"The file {file_id} is in use by a fine-tuning job: wait until it ends, or cancel it.")
