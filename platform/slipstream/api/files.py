"""/v1/files: the rows that fine-tuning jobs train on, as OpenAI's Files API has them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from adapter_registry.errors import NotPublished
from adapter_registry.jobs import FILE_PREFIX, FileRecord, Page, PageQuery, new_id, no_file
from adapter_registry.keys import Role
from adapter_registry.records import utc_now
from slipstream.api.auth import CallerDep
from slipstream.api.connection import while_connected
from slipstream.api.downloads import send_file
from slipstream.api.runtime import RuntimeDep
from slipstream.api.services import ApiServices
from slipstream.api.sse import Json
from slipstream.api.uploads import DATA, DATA_FORM, receive_upload
from slipstream.errors import InvalidRequest
from slipstream.publishing import run_to_end

router = APIRouter(tags=["Fine-tuning"])
After = Annotated[str | None, Query(max_length=100, description="Id of the last item of the page before.")]
_PURPOSE = "fine-tune"
_UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSON lines with `messages`, or with `prompt` and `completion`; or a .csv.",
                        },
                        "purpose": {"type": "string", "enum": [_PURPOSE]},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", openapi_extra=_UPLOAD_FORM)
async def upload_file(request: Request, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Upload a data file. Its rows are read when a job uses it."""
    tenant, services = caller.acting_tenant(Role.PUBLISHER), runtime.services
    async with receive_upload(request, services.upload_dir, DATA_FORM) as upload:
        if upload.fields["purpose"] != _PURPOSE:
            raise InvalidRequest(
                f"The purpose '{upload.fields['purpose'][:80]}' is not served here: files are for '{_PURPOSE}'.",
                param="purpose",
            )
        keeping = _keep(services, tenant, upload.names[0], upload.folder / DATA)
        record = await while_connected(request.receive, keeping)
    return file_body(record)


@router.get("/v1/files")
async def list_files(
    caller: CallerDep,
    runtime: RuntimeDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=100)] = None,
) -> Json:
    """The tenant's files."""
    tenant = caller.acting_tenant(Role.PUBLISHER)
    if purpose not in (None, _PURPOSE):
        return page_body(Page([], has_more=False), [])
    query = PageQuery(after, limit, newest_first=order == "desc")
    try:
        page = await runtime.services.jobs.list_files(tenant, query)
    except NotPublished as error:
        raise InvalidRequest(str(error), param="after") from error
    return page_body(page, [file_body(record) for record in page.items])


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """One file's record."""
    return file_body(await runtime.services.jobs.get_file(caller.acting_tenant(Role.PUBLISHER), known_form(file_id)))


@router.get("/v1/files/{file_id}/content", response_class=StreamingResponse)
async def get_content(file_id: str, caller: CallerDep, runtime: RuntimeDep) -> StreamingResponse:
    """A file's content, as it was uploaded."""
    services = runtime.services
    record = await services.jobs.get_file(caller.acting_tenant(Role.PUBLISHER), known_form(file_id))
    return await send_file(services, record.tenant, name=record.filename, sha256=record.sha256, size=record.size)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Remove a file; 409 while a job that has not ended reads it. Its content is gone after the next sweep."""
    await runtime.services.jobs.delete_file(caller.acting_tenant(Role.PUBLISHER), known_form(file_id))
    return {"id": file_id, "object": "file", "deleted": True}


def known_form(file_id: str) -> str:
    """`file_id` if it could be one of ours; else `NotPublished`, as for every file that is not there."""
    if not re.fullmatch(r"file-[0-9a-f]{24}", file_id):
        raise no_file(file_id)
    return file_id


def file_body(record: FileRecord) -> Json:
    """OpenAI's `file` object."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.size,
        "created_at": int(record.created_at.timestamp()),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",  # OpenAI's word for "ready"; rows are read by the job that trains on them
        "sha256": record.sha256,
    }


def page_body(page: Page[Any], data: list[Json]) -> Json:
    """OpenAI's list, with its cursor."""
    ids = [item["id"] for item in data] or [None]
    return {"object": "list", "data": data, "has_more": page.has_more, "first_id": ids[0], "last_id": ids[-1]}


async def _keep(services: ApiServices, tenant: str, filename: str, path: Path) -> FileRecord:
    sha256, size = await run_to_end(lambda: _hash(path))
    if size == 0:
        raise InvalidRequest("The file is empty.", code="empty_file", param="file")
    record = FileRecord(
        id=new_id(FILE_PREFIX),
        tenant=tenant,
        filename=filename,
        purpose=_PURPOSE,
        size=size,
        sha256=sha256,
        created_at=utc_now(),
    )
    await services.store.claim_blobs(tenant, [sha256])
    await services.blobs.put_file(tenant, sha256, path)
    await services.jobs.add_file(record)
    return record


def _hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
