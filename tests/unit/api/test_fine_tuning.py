"""/v1/fine_tuning/jobs, through OpenAI's own client and past it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai as openai_package
import pytest
from openai import AsyncOpenAI
from support.api_app import BASE, ApiWorld

from adapter_registry.jobs import Checkpoint, JobError, JobEvent, JobState
from adapter_registry.records import utc_now

ROWS = b'{"prompt": "1+1=", "completion": "2"}\n'
JOBS = "/v1/fine_tuning/jobs"


async def upload(openai: AsyncOpenAI) -> str:
    return (await openai.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")).id


async def create(openai: AsyncOpenAI, suffix: str = "sql", **fields: Any) -> Any:
    return await openai.fine_tuning.jobs.create(
        **{"model": BASE, "training_file": await upload(openai), "suffix": suffix, **fields}
    )


async def test_a_job_is_created_as_openai_would(openai: AsyncOpenAI, world: ApiWorld) -> None:
    training, validation = await upload(openai), await upload(openai)
    job = await openai.fine_tuning.jobs.create(
        model=BASE,
        training_file=training,
        validation_file=validation,
        suffix="sql",
        seed=7,
        metadata={"team": "search"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}},
        },
        extra_body={"slipstream": {"method": "turbo_lora", "streams": 3, "stream_rank": 128, "max_minutes": 15}},
    )
    assert job.id.startswith("ftjob-")
    assert (job.object, job.status, job.model) == ("fine_tuning.job", "queued", BASE)
    assert (job.training_file, job.validation_file, job.seed) == (training, validation, 7)
    assert (job.fine_tuned_model, job.finished_at, job.error, job.result_files) == (None, None, None, [])
    assert job.metadata == {"team": "search"}
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == "auto"
    assert await openai.fine_tuning.jobs.retrieve(job.id) == job
    [record] = await world.jobs.active()
    assert record.options == {
        "method": "turbo_lora",
        "streams": 3,
        "stream_rank": 128,
        "max_minutes": 15,
        "epochs": 2,
        "learning_rate": pytest.approx(0.5 * 5e-4),
        "stream_learning_rate": pytest.approx(0.5 * 2e-3),
        "seed": 7,
    }
    assert record.created_by.startswith("key_")


async def test_the_old_place_of_hyperparameters(openai: AsyncOpenAI, world: ApiWorld) -> None:
    job = await create(openai, hyperparameters={"n_epochs": 4, "batch_size": 8})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (4, 8)
    [record] = await world.jobs.active()
    assert (record.options["epochs"], record.options["batch_size"]) == (4, 8)


async def test_a_seed_is_drawn_and_kept(openai: AsyncOpenAI, world: ApiWorld) -> None:
    jobs = [await create(openai) for _ in range(2)]
    assert jobs[0].seed != jobs[1].seed
    assert [record.options["seed"] for record in await world.jobs.active()] == [job.seed for job in jobs]


async def test_jobs_are_listed_by_page_and_metadata(openai: AsyncOpenAI) -> None:
    jobs = [await create(openai, metadata={"n": str(n % 2)} if n else None) for n in range(5)]
    newest_first = [job.id for job in reversed(jobs)]
    assert [job.id async for job in openai.fine_tuning.jobs.list(limit=2)] == newest_first
    odd = [job.id async for job in openai.fine_tuning.jobs.list(metadata={"n": "1"}, limit=1)]
    assert odd == [jobs[3].id, jobs[1].id]
    plain = await openai.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in plain.data] == [jobs[0].id]
    with pytest.raises(openai_package.BadRequestError, match="not in this list"):
        await openai.fine_tuning.jobs.list(after="ftjob-" + "0" * 24)


async def test_events_and_checkpoints(openai: AsyncOpenAI, world: ApiWorld) -> None:
    job = await create(openai)
    for step in range(5):
        event = JobEvent(
            id=f"ftevent-{step}",
            created_at=utc_now(),
            message=f"Step {step}",
            type="metrics",
            data={"step": step, "train/loss": 0.5},
        )
        await world.jobs.add_event("demo", job.id, event)
    seen = [event async for event in openai.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert [event.message for event in seen[:5]] == [f"Step {step}" for step in (4, 3, 2, 1, 0)]
    assert seen[0].type == "metrics"
    assert seen[0].data == {"step": 4, "train/loss": 0.5}
    assert "queued" in seen[5].message
    saved = Checkpoint(
        id="ftckpt_1",
        created_at=utc_now(),
        step=50,
        metrics={"valid_loss": 0.25},
        fine_tuned_model_checkpoint="sql:ckpt-step-50",
    )
    await world.jobs.add_checkpoint("demo", job.id, saved)
    [found] = [each async for each in openai.fine_tuning.jobs.checkpoints.list(job.id)]
    assert (found.step_number, found.metrics.valid_loss, found.fine_tuning_job_id) == (50, 0.25, job.id)
    for what in ("events", "checkpoints"):
        with pytest.raises(openai_package.BadRequestError, match="not in this list"):
            await openai.get(f"/fine_tuning/jobs/{job.id}/{what}?after=x", cast_to=object)


async def test_how_jobs_end(openai: AsyncOpenAI, world: ApiWorld) -> None:
    good, bad = await create(openai), await create(openai)
    for job in (good, bad):
        await world.jobs.update_job("demo", job.id, lambda j: j.moved(JobState.VALIDATING_FILES, started_at=utc_now()))
    await world.jobs.update_job("demo", good.id, lambda j: j.moved(JobState.RUNNING))
    done = {"fine_tuned_model": "sql@3", "trained_tokens": 1234, "finished_at": utc_now()}
    await world.jobs.update_job("demo", good.id, lambda j: j.moved(JobState.SUCCEEDED, **done))
    error = JobError(code="invalid_training_file", message="training_file.jsonl, row 17: no.", param="training_file")
    await world.jobs.update_job("demo", bad.id, lambda j: j.moved(JobState.FAILED, error=error))
    good = await openai.fine_tuning.jobs.retrieve(good.id)
    assert (good.status, good.fine_tuned_model, good.trained_tokens) == ("succeeded", "sql@3", 1234)
    assert good.finished_at is not None
    assert good.finished_at >= good.created_at
    bad = await openai.fine_tuning.jobs.retrieve(bad.id)
    assert bad.status == "failed"
    assert bad.error is not None
    assert (bad.error.code, bad.error.param) == ("invalid_training_file", "training_file")
    assert "row 17" in bad.error.message


async def test_cancelling(openai: AsyncOpenAI, world: ApiWorld) -> None:
    waiting, running, publishing = [await create(openai) for _ in range(3)]
    assert (await openai.fine_tuning.jobs.cancel(waiting.id)).status == "cancelled"
    with pytest.raises(openai_package.BadRequestError, match="is cancelled"):
        await openai.fine_tuning.jobs.cancel(waiting.id)
    for job in (running, publishing):
        await world.jobs.update_job("demo", job.id, lambda j: j.moved(JobState.VALIDATING_FILES, attempt=1))
        await world.jobs.update_job("demo", job.id, lambda j: j.moved(JobState.RUNNING))
    asked = await openai.fine_tuning.jobs.cancel(running.id)
    assert (asked.status, asked.model_dump()["slipstream"]["cancel_requested"]) == ("running", True)
    await world.jobs.update_job("demo", publishing.id, lambda j: j.changed(publishing=True))
    with pytest.raises(openai_package.BadRequestError, match="published"):
        await openai.fine_tuning.jobs.cancel(publishing.id)


async def test_another_tenants_job_looks_unknown(openai: AsyncOpenAI, world: ApiWorld) -> None:
    job = await create(openai)
    unknown = "ftjob-" + "0" * 24
    async with world.client(await world.key("globex")) as other:
        for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/checkpoints")):
            answers = [await other.request(method, f"{JOBS}/{each}{path}") for each in (job.id, unknown, "x")]
            assert {answer.status_code for answer in answers} == {404}
            assert answers[0].text.replace(job.id, "ID") == answers[1].text.replace(unknown, "ID")
        body = {"model": BASE, "training_file": job.training_file, "suffix": "x"}
        assert (await other.post(JOBS, json=body)).json()["error"]["param"] == "training_file"
        assert (await other.get(JOBS)).json()["data"] == []
    assert (await openai.fine_tuning.jobs.retrieve(job.id)).status == "queued"


async def test_streams_for_an_adapter_are_pinned_to_its_version(openai: AsyncOpenAI, world: ApiWorld) -> None:
    version = await world.publish("sql")
    await create(openai, "sql-fast", extra_body={"slipstream": {"method": "turbo", "adapter": "sql"}})
    [record] = await world.jobs.active()
    assert (record.adapter, record.adapter_digest) == ("sql@1", version.digest)
    for adapter, method, status in (("none", "turbo", 404), (BASE, "turbo", 400), ("sql", "turbo_lora", 400)):
        with pytest.raises(openai_package.APIStatusError) as caught:
            await create(openai, extra_body={"slipstream": {"method": method, "adapter": adapter}})
        assert caught.value.status_code == status


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"model": "gpt-4o-mini"}, "model", BASE),
        ({"training_file": "file-" + "0" * 24}, "training_file", "no file"),
        ({"training_file": "nonsense"}, "training_file", "no file"),
        ({"validation_file": "file-" + "0" * 24}, "validation_file", "no file"),
        ({"suffix": None}, "suffix", "name of the adapter"),
        ({"suffix": "Not A Name"}, None, "suffix"),
        ({"slipstream": {"name": "Not A Name"}}, "slipstream.name", "slipstream.name"),
        ({"method": {"type": "dpo"}}, "method", "dpo"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method", "reinforcement"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "wandb"),
        ({"seed": -1}, "seed", "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters", "hyperparameters"),
        ({"hyperparameters": {"n_epoch": 1}}, "hyperparameters.n_epoch", "n_epoch"),
        ({"metadata": {"a": 1}}, "metadata.a", "metadata"),
        ({"slipstream": {"streems": 3}}, "slipstream.streems", "streems"),
        ({"slipstream": {"streams": 99}}, "slipstream.streams", "streams"),
        ({"slipstream": {"method": "magic"}}, "slipstream.method", "method"),
        ({"slipstream": {"data": "/etc/passwd"}}, "slipstream.data", "data"),
        ({"slipstream": {"output": "/"}}, "slipstream.output", "output"),
        ({"slipstream": {"lora_targets": ["\ud800"]}}, "slipstream", "surrogate"),
        ({"slipstream": {"lora_targets": ["x" * 20_000]}}, "slipstream", "larger"),
        ({"slipstream": {"stream_rank": None, "conditioned": True}}, "slipstream", "conditioned"),
        ({"slipstream": {"seed": 3}}, "slipstream.seed", "seed"),
        ({"slipstream": {"epochs": 2}, "hyperparameters": {"n_epochs": 3}}, "slipstream.epochs", "both"),
        (
            {
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
                "hyperparameters": {"n_epochs": 1},
            },
            "hyperparameters",
            "send one",
        ),
        ({"unknown": 1}, "unknown", "unknown"),
    ],
)
async def test_bad_bodies(
    http: httpx.AsyncClient, openai: AsyncOpenAI, world: ApiWorld, change: Any, param: str | None, says: str
) -> None:
    body = {"model": BASE, "training_file": await upload(openai), "suffix": "sql", **change}
    content = json.dumps(body)  # not httpx's own: it cannot spell half of a surrogate pair
    answer = await http.post(JOBS, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert (error["param"] or "").startswith(param or "")
    assert says in error["message"]
    assert not await world.jobs.active()


async def test_an_adapter_cannot_have_the_bases_name(http: httpx.AsyncClient, openai: AsyncOpenAI) -> None:
    body = {"model": BASE, "training_file": await upload(openai), "suffix": BASE.rpartition("/")[2]}
    assert (await http.post(JOBS, json=body)).status_code == 409


async def test_a_tenants_queue_is_bounded(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.rebuild(max_waiting_jobs=2)
    async with world.client(await world.key()) as http:
        file_id = await upload(openai)
        body = {"model": BASE, "training_file": file_id, "suffix": "sql"}
        statuses = [(await http.post(JOBS, json=body)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        async with world.client(await world.key("globex")) as other:
            theirs = (await other.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROWS)})).json()
            assert (await other.post(JOBS, json={**body, "training_file": theirs["id"]})).status_code == 200


async def test_the_application_starts_what_is_queued(openai: AsyncOpenAI, world: ApiWorld) -> None:
    job = await create(openai)
    world.rebuild(jobs_every_s=0.01)
    async with world.app.router.lifespan_context(world.app):
        for _ in range(200):
            if world.runner.started:
                break
            await asyncio.sleep(0.01)
    [(started, base)] = world.runner.started
    assert (started.id, started.attempt, base.id) == (job.id, 1, BASE)
