"""/v1/fine_tuning/jobs: OpenAI's fine-tuning API over our trainer. Nothing trains here: jobs are records, and
`slipstream.training` says who runs them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapter_registry.errors import NotPublished
from adapter_registry.jobs import (
    JOB_PREFIX,
    Checkpoint,
    Hyperparameters,
    IllegalTransition,
    JobEvent,
    JobRecord,
    Page,
    PageQuery,
    ask_to_cancel,
    new_id,
    no_job,
)
from adapter_registry.keys import Role
from adapter_registry.records import AdapterVersion, check_name, utc_now
from slipstream.api.auth import CallerDep
from slipstream.api.caller import Caller
from slipstream.api.fields import Text, refused
from slipstream.api.files import After, known_form, page_body
from slipstream.api.runtime import Runtime, RuntimeDep
from slipstream.api.sse import Json
from slipstream.errors import Conflict, InvalidRequest, Overloaded
from slipstream.training.jobs import job_event
from slipstream.training.options import JobOptions

router = APIRouter(tags=["Fine-tuning"])
Limit = Annotated[int, Query(ge=1, le=1000)]
_SCANNED = 200  # jobs read at a time while a listing is filtered
_OTHER_METHODS = "only 'supervised' is: for our own methods send it, with 'slipstream': {'method': 'turbo_lora'}."


class HyperparameterFields(BaseModel):
    """OpenAI's hyperparameters; null and "auto" leave the choice to the trainer."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Literal["auto"] | None = None


class SupervisedFields(BaseModel):
    """`method.supervised`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    hyperparameters: HyperparameterFields | None = None


class MethodFields(BaseModel):
    """`method`: how OpenAI's clients say what kind of training they want."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["supervised"]
    supervised: SupervisedFields | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "supervised":
            raise refused("method", f"The method '{kind[:40]}' is not served here: {_OTHER_METHODS}")
        return data


class NewJob(BaseModel):
    """The body of POST /v1/fine_tuning/jobs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=300)]
    training_file: Annotated[str, Field(max_length=100)]
    validation_file: Annotated[str, Field(max_length=100)] | None = None
    suffix: Annotated[str, Field(max_length=64, description="The adapter's name.")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    method: MethodFields | None = None
    hyperparameters: HyperparameterFields | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    slipstream: JobOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_integrations(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("integrations"):
            raise refused(
                "integrations",
                "Integrations such as wandb are not served here. Read the metrics from the job's events, or train with "
                "`slipstream train --report-to wandb`.",
            )
        return data

    def chosen_hyperparameters(self) -> Hyperparameters:
        """From the new place or the old one, not both."""
        new = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        if new is not None and self.hyperparameters is not None:
            raise InvalidRequest(
                "'hyperparameters' and 'method.supervised.hyperparameters' are two names of one thing: send one.",
                param="hyperparameters",
            )
        sent = new or self.hyperparameters or HyperparameterFields()
        return Hyperparameters.model_validate(sent.model_dump(exclude_none=True))

    def adapter_name(self) -> str:
        """`suffix`, or `slipstream.name`."""
        name = self.slipstream.name if self.slipstream else None
        if name is None and self.suffix is None:
            raise InvalidRequest(
                "The field 'suffix' is missing: here it is the name of the adapter that the job publishes.",
                param="suffix",
            )
        return check_name(name or self.suffix or "", "adapter name (field 'suffix' or 'slipstream.name')")


@router.post("/v1/fine_tuning/jobs")
async def create_job(body: NewJob, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Queue a job. Its files are read by the job itself: a bad row ends it as failed, naming the row."""
    tenant = caller.acting_tenant(Role.PUBLISHER)
    job = await _new_job(body, caller, runtime)
    jobs = runtime.services.jobs
    unfinished = sum(each.tenant == tenant for each in await jobs.active())
    if unfinished >= runtime.services.max_waiting_jobs:
        raise Overloaded(
            f"{unfinished} of your jobs have not ended yet. Wait for one, or cancel one.", retry_after_s=60
        )
    await _check_files(runtime, job)
    await jobs.add_job(job)
    await jobs.add_event(tenant, job.id, job_event(f"The job is queued. It will be published as '{job.name}'."))
    return job_body(job)


@router.get("/v1/fine_tuning/jobs")
async def list_jobs(
    request: Request, caller: CallerDep, runtime: RuntimeDep, after: After = None, limit: Limit = 20
) -> Json:
    """The tenant's jobs, newest first; `metadata[key]=value` filters, `metadata=null` finds those without any."""
    wanted = _metadata_filter(request.query_params)
    try:
        page = await _matching(runtime, caller.acting_tenant(Role.PUBLISHER), wanted, after, limit)
    except NotPublished as error:
        raise InvalidRequest(str(error), param="after") from error
    return page_body(page, [job_body(job) for job in page.items])


@router.get("/v1/fine_tuning/jobs/{job_id}")
async def get_job(job_id: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """One job."""
    return job_body(await runtime.services.jobs.get_job(caller.acting_tenant(Role.PUBLISHER), _known_form(job_id)))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Cancel a job: at once while it waits, else as soon as its worker has stopped. 400 when it is too late."""
    jobs, tenant = runtime.services.jobs, caller.acting_tenant(Role.PUBLISHER)
    try:
        job = await jobs.update_job(tenant, _known_form(job_id), lambda found: ask_to_cancel(found, utc_now()))
    except IllegalTransition as error:
        raise InvalidRequest(str(error), code="job_not_cancellable") from error
    await jobs.add_event(tenant, job.id, job_event("Cancelling was asked for."))
    return job_body(job)


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
async def list_events(
    job_id: str, caller: CallerDep, runtime: RuntimeDep, after: After = None, limit: Limit = 20
) -> Json:
    """What the job said, newest first: messages, and metrics by step."""
    tenant, jobs = caller.acting_tenant(Role.PUBLISHER), runtime.services.jobs
    await jobs.get_job(tenant, _known_form(job_id))
    try:
        page = await jobs.list_events(tenant, job_id, PageQuery(after, limit))
    except NotPublished as error:
        raise InvalidRequest(str(error), param="after") from error
    return page_body(page, [_event_body(event) for event in page.items])


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, caller: CallerDep, runtime: RuntimeDep, after: After = None, limit: Limit = 10
) -> Json:
    """What the trainer saved on its way, newest first. A job goes on from there if its worker is lost; none is served."""
    tenant, jobs = caller.acting_tenant(Role.PUBLISHER), runtime.services.jobs
    await jobs.get_job(tenant, _known_form(job_id))
    try:
        page = await jobs.list_checkpoints(tenant, job_id, PageQuery(after, limit))
    except NotPublished as error:
        raise InvalidRequest(str(error), param="after") from error
    return page_body(page, [_checkpoint_body(saved, job_id) for saved in page.items])


async def _new_job(body: NewJob, caller: Caller, runtime: Runtime) -> JobRecord:
    tenant, options = caller.acting_tenant(Role.PUBLISHER), body.slipstream or JobOptions()
    name = body.adapter_name()
    if runtime.catalog.base_of(name) is not None:
        raise Conflict(f"'{name}' is the base model's own name; requests for it would never reach an adapter.")
    hyperparameters = body.chosen_hyperparameters()
    seed = secrets.randbits(31) if body.seed is None else body.seed
    chosen = options.chosen(hyperparameters, seed)
    base = await runtime.catalog.base_for_training(body.model)
    over = await _over(runtime, caller, options.adapter, base.base_id)
    return JobRecord(
        id=new_id(JOB_PREFIX),
        tenant=tenant,
        name=name,
        suffix=body.suffix,
        model=base.base_id,
        training_file=_file_id(body.training_file, "training_file"),
        validation_file=body.validation_file and _file_id(body.validation_file, "validation_file"),
        hyperparameters=hyperparameters,
        options=chosen,
        adapter=over.ref if over else None,
        adapter_digest=over.digest if over else None,
        seed=seed,
        metadata=body.metadata or {},
        created_by=caller.key_id,
        created_at=utc_now(),
    )


async def _over(runtime: Runtime, caller: Caller, adapter: str | None, base_id: str) -> AdapterVersion | None:
    """The version that a speculator is asked for, pinned now: a later publish does not change what the job does."""
    if adapter is None:
        return None
    target = await runtime.catalog.resolve(caller, adapter)
    if target.version is None or target.base_id != base_id or target.shared:
        raise InvalidRequest(
            f"'{adapter}' is not an adapter of yours for the base model '{base_id}'.", param="slipstream.adapter"
        )
    return target.version


async def _check_files(runtime: Runtime, job: JobRecord) -> None:
    for param, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
        if file_id is not None:
            try:
                await runtime.services.jobs.get_file(job.tenant, file_id)
            except NotPublished as error:
                raise InvalidRequest(str(error), code="file_not_found", param=param) from error


def _file_id(file_id: str, param: str) -> str:
    try:
        return known_form(file_id)
    except NotPublished as error:
        raise InvalidRequest(str(error), code="file_not_found", param=param) from error


def _known_form(job_id: str) -> str:
    if not re.fullmatch(r"ftjob-[0-9a-f]{24}", job_id):
        raise no_job(job_id)
    return job_id


def _metadata_filter(query: Mapping[str, str]) -> dict[str, str] | None:
    """The pairs asked for; empty for jobs without metadata, None for no filter."""
    found = {match[1]: value for key, value in query.items() if (match := re.fullmatch(r"metadata\[(.{1,64})\]", key))}
    return {} if not found and query.get("metadata") == "null" else found or None


async def _matching(
    runtime: Runtime, tenant: str, wanted: Mapping[str, str] | None, after: str | None, limit: int
) -> Page[JobRecord]:
    """A page of the jobs with this metadata. Jobs are few: the rest is read and left out."""
    if wanted is None:
        return await runtime.services.jobs.list_jobs(tenant, PageQuery(after, limit))
    found: list[JobRecord] = []
    while True:
        page = await runtime.services.jobs.list_jobs(tenant, PageQuery(after, _SCANNED))
        found += [job for job in page.items if _has(job, wanted)]
        if len(found) > limit or not page.has_more:
            return Page(found[:limit], has_more=len(found) > limit)
        after = page.items[-1].id


def _has(job: JobRecord, wanted: Mapping[str, str]) -> bool:
    return not job.metadata if not wanted else wanted.items() <= job.metadata.items()


def job_body(job: JobRecord) -> Json:
    """OpenAI's `fine_tuning.job` object; ours adds `slipstream`."""
    hyperparameters = job.hyperparameters.model_dump()
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "model": job.model,
        "created_at": int(job.created_at.timestamp()),
        "finished_at": _seconds(job.finished_at),
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant,
        "status": job.state,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": list(job.result_files),
        "trained_tokens": job.trained_tokens,
        "error": job.error.model_dump() if job.error else None,
        "user_provided_suffix": job.suffix,
        "seed": job.seed,
        "estimated_finish": _seconds(job.estimated_finish),
        "integrations": [],
        "metadata": job.metadata,
        "hyperparameters": hyperparameters,
        "method": {"type": job.method, "supervised": {"hyperparameters": hyperparameters}},
        "slipstream": {
            **job.options,
            "name": job.name,
            "adapter": job.adapter,
            "attempt": job.attempt,
            "started_at": _seconds(job.started_at),
            "cancel_requested": job.cancel_requested,
        },
    }


def _event_body(event: JobEvent) -> Json:
    return {
        "object": "fine_tuning.job.event",
        "id": event.id,
        "created_at": int(event.created_at.timestamp()),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def _checkpoint_body(saved: Checkpoint, job_id: str) -> Json:
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": saved.id,
        "created_at": int(saved.created_at.timestamp()),
        "fine_tuning_job_id": job_id,
        "fine_tuned_model_checkpoint": saved.fine_tuned_model_checkpoint,
        "step_number": saved.step,
        "metrics": {"step": saved.step, **saved.metrics},
    }


def _seconds(moment: Any) -> int | None:
    return None if moment is None else int(moment.timestamp())
