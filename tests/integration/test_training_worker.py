"""A job from rows to a published version with the real trainer in its own process, on a tiny model; stores in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support.jobs import claimed, file_record, job_record
from support.tiny_model import save_tiny_model, tiny_tokenizer

from adapter_registry.jobs import JobRecord, JobState, PageQuery
from adapter_registry.records import AdapterKind, parse_reference, utc_now
from slipstream.engine.loader import describe, load_model
from slipstream.protocol import AdapterRef
from slipstream.testing import MemoryBlobs, MemoryJobs, MemoryStore
from slipstream.training.supervise import Bench, JobSupervisor

ROWS = "".join(f'{{"prompt": "{n}+1=", "completion": "{n + 1}"}}\n' for n in range(16))
OPTIONS: dict[str, Any] = {
    "method": "turbo_lora",
    "max_steps": 4,
    "batch_size": 4,
    "lora_rank": 2,
    "streams": 2,
    "stream_rank": 4,
    "save_every": 2,
    "eval_every": 2,
    "gate_rows": 2,
    "bf16": False,
    "seed": 1,
}


async def run(folder: Path, rows: str, **fields: Any) -> tuple[JobRecord, MemoryJobs, MemoryStore]:
    """One attempt at a job with these rows."""
    base = folder / "tiny"
    save_tiny_model(base)
    spec = describe(load_model(str(base), "float32", "cpu"), "tiny", str(base), tiny_tokenizer())
    store, blobs = MemoryStore(), MemoryBlobs()
    jobs = MemoryJobs(store)

    async def nothing(ref: AdapterRef, destination: Path) -> None:
        raise AssertionError("this job is for no adapter")

    async def base_path() -> Path:
        return base

    bench = Bench(
        jobs=jobs,
        store=store,
        blobs=blobs,
        fetch_adapter=nothing,
        base_path=base_path,
        folder=folder / "jobs",
        command=[sys.executable, "-m", "slipstream.training.worker"],
    )
    file = await claimed(store, file_record(rows))
    await blobs.put_bytes("acme", file.sha256, rows.encode())
    await jobs.add_file(file)
    job = job_record(file, model="tiny", options=OPTIONS, attempt=1, heartbeat_at=utc_now(), **fields)
    await jobs.add_job(job)
    await JobSupervisor(job, spec, bench).run()
    done = await jobs.get_job("acme", job.id)
    if done.error is not None and done.error.code in ("worker_failed", "training_failed"):
        pytest.fail((folder / "jobs" / job.id / "worker.log").read_text())
    return done, jobs, store


async def test_a_turbo_lora_is_trained_and_published(tmp_path: Path) -> None:
    done, jobs, store = await run(tmp_path, ROWS)
    assert done.error is None
    assert (done.state, done.fine_tuned_model) == (JobState.SUCCEEDED, "sql@1")
    assert done.trained_tokens
    version = await store.resolve("acme", parse_reference("sql"))
    assert (version.kind, version.num_streams, version.created_by) == (AdapterKind.TURBO_LORA, 2, done.id)
    assert "training_card.md" in [file.path for file in version.attachments]
    events = (await jobs.list_events("acme", done.id, PageQuery(limit=100))).items
    names = {name for event in events if event.type == "metrics" for name in event.data or {}}
    assert "step" in names
    assert any("loss" in name for name in names)
    assert [saved.step for saved in (await jobs.list_checkpoints("acme", done.id, PageQuery())).items][-1] == 2


async def test_a_bad_row_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    done, _, store = await run(tmp_path, ROWS + '{"prompt": "1+1="}\n')
    assert done.error is not None
    assert (done.state, done.error.code, done.error.param) == (
        JobState.FAILED,
        "invalid_training_file",
        "training_file",
    )
    assert "row 17" in done.error.message
    assert await store.list("acme") == []
