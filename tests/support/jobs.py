"""Files and jobs for tests."""

from __future__ import annotations

import hashlib
from typing import Any

from adapter_registry.jobs import FILE_PREFIX, JOB_PREFIX, FileRecord, JobRecord, new_id
from adapter_registry.records import utc_now
from adapter_registry.store import Store


def file_record(text: str = "rows", tenant: str = "acme", **fields: Any) -> FileRecord:
    """A file whose content is `text`."""
    made: dict[str, Any] = {
        "id": new_id(FILE_PREFIX),
        "tenant": tenant,
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "size": len(text),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "created_at": utc_now(),
    }
    return FileRecord.model_validate({**made, **fields})


async def claimed(store: Store, file: FileRecord) -> FileRecord:
    """The same, with its content claimed."""
    await store.claim_blobs(file.tenant, [file.sha256])
    return file


def job_record(file: FileRecord, **fields: Any) -> JobRecord:
    """A job that trains on `file`."""
    made: dict[str, Any] = {
        "id": new_id(JOB_PREFIX),
        "tenant": file.tenant,
        "name": "sql",
        "suffix": "sql",
        "model": "fake/base-1b",
        "training_file": file.id,
        "seed": 7,
        "created_at": utc_now(),
    }
    return JobRecord.model_validate({**made, **fields})
