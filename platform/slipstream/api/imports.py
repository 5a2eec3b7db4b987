"""/v1/imports: adapters in parts that may be sent again and in any order, and adapters that the server fetches itself."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from adapter_registry.errors import InUse, NotPublished
from adapter_registry.imports import (
    IMPORT_PREFIX,
    IMPORTS_KEPT,
    PART_BYTES,
    ImportFault,
    ImportRecord,
    no_import,
    part_count,
    part_size,
)
from adapter_registry.jobs import PageQuery, new_id
from adapter_registry.keys import Role
from adapter_registry.records import (
    FileEntry,
    Labels,
    Lineage,
    SpeculationPolicy,
    VersionState,
    VersionWish,
    check_name,
    utc_now,
)
from adapter_registry.store import storage_full
from slipstream.api.adapters import refuse_base_name
from slipstream.api.auth import CallerDep
from slipstream.api.caller import Caller
from slipstream.api.files import After, page_body
from slipstream.api.runtime import Runtime, RuntimeDep
from slipstream.api.sse import Json
from slipstream.api.uploads import scratch_folder
from slipstream.api.wishes import SmokePrompts
from slipstream.errors import InvalidRequest, PayloadTooLarge
from slipstream.publishing import run_to_end

router = APIRouter(tags=["Imports"])
ImportId = Annotated[str, Path(max_length=100)]
_PART_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class NewImport(BaseModel):
    """The body of POST /v1/imports: either `files`, which are then sent in parts, or a `source` to fetch them from."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=64)]
    base: Annotated[str, Field(max_length=200)] | None = None
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=64)] | None = None
    source: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    speculation: SpeculationPolicy = SpeculationPolicy()
    labels: Labels = Field(default_factory=dict)
    lineage: Lineage = Lineage()
    smoke: SmokePrompts = ()


@router.post("/v1/imports", status_code=201)
async def begin(body: NewImport, caller: CallerDep, runtime: RuntimeDep, response: Response) -> Json:
    """Begin an upload in parts, or have the server pull: 201 or 202, with what is still to be sent."""
    tenant, services = caller.acting_tenant(Role.PUBLISHER), runtime.services
    if (body.files is None) == (body.source is None):
        raise InvalidRequest("Send either 'files' or a 'source'.", code="invalid_value", param="files")
    refuse_base_name(runtime, check_name(body.name))
    await runtime.catalog.base(body.base)
    record = ImportRecord(
        id=new_id(IMPORT_PREFIX),
        tenant=tenant,
        name=body.name,
        base=body.base,
        files=body.files or (),
        source=body.source or "",
        wish=VersionWish(speculation=body.speculation, labels=body.labels, lineage=body.lineage),
        smoke=body.smoke,
        created_by=caller.key_id,
        created_at=utc_now(),
    )
    if record.source:
        services.sources.check(record.source)
        response.status_code = 202
    await _check_files(runtime, record)
    await services.imports.add(record)
    response.headers["Location"] = f"/v1/imports/{record.id}"
    return _body(record, {})


@router.get("/v1/imports")
async def list_imports(
    caller: CallerDep, runtime: RuntimeDep, after: After = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Json:
    """The tenant's imports, newest first."""
    tenant = caller.acting_tenant(Role.PUBLISHER)
    try:
        page = await runtime.services.imports.list(tenant, PageQuery(after, limit))
    except NotPublished as error:
        raise InvalidRequest(str(error), param="after") from error
    return page_body(page, [_body(record, None) for record in page.items])


@router.get("/v1/imports/{import_id}")
async def get(import_id: ImportId, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """One import: its state, and which parts of its files are still missing."""
    record = await _found(runtime, caller, import_id)
    return _body(record, await runtime.services.imports.parts(record.tenant, record.id))


@router.put("/v1/imports/{import_id}/files/{path}/parts/{index}", status_code=204, openapi_extra=_PART_BODY)
async def put_part(
    import_id: ImportId,
    path: Annotated[str, Path(max_length=255)],
    index: Annotated[int, Path(ge=0, le=10**6)],
    request: Request,
    caller: CallerDep,
    runtime: RuntimeDep,
    content_digest: Annotated[str | None, Header(description="RFC 9530: sha-256=:<base64>:", max_length=1000)] = None,
) -> Response:
    """One part of a file. Parts may come in any order, at once, and again; all but a file's last have `part_bytes`."""
    record, services = await _found(runtime, caller, import_id), runtime.services
    entry = record.file(path)
    if entry is None or index >= part_count(entry.size):
        raise InvalidRequest(f"The import has no part {index} of '{path[:80]}'.", code="no_such_part", param="index")
    announced = None if content_digest is None else _sha256_of(content_digest)
    expected = part_size(entry.size, index)
    async with scratch_folder(services.upload_dir) as folder:
        sha256 = await _receive(request, folder / "part", expected)
        if announced not in (None, sha256):
            raise InvalidRequest(
                "The part is not what its Content-Digest says: it changed on its way. Send it again.",
                code="checksum_mismatch",
                param="Content-Digest",
            )
        await services.store.claim_blobs(record.tenant, [sha256])
        await services.blobs.put_file(record.tenant, sha256, folder / "part")
        await services.imports.put_part(record.tenant, record.id, path, index, sha256)
    return Response(status_code=204)


@router.post("/v1/imports/{import_id}/complete", status_code=202)
async def complete(import_id: ImportId, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Every part is here: have them put together, checked and published. GET the import to see what becomes of it."""
    record, services = await _found(runtime, caller, import_id), runtime.services
    parts = await services.imports.parts(record.tenant, record.id)
    if record.state is VersionState.REGISTERED and not record.source:
        missing = [(entry.path, index) for entry in record.files for index in _missing(entry, parts)]
        if missing:
            path, index = missing[0]
            raise InvalidRequest(
                f"{len(missing)} parts are missing, the first is part {index} of '{path}'. GET the import for the others.",
                code="incomplete_upload",
                param="files",
            )

    def validating(found: ImportRecord) -> ImportRecord:
        return found.changed(state=VersionState.VALIDATING)

    if not record.has_ended:  # asked again, because the answer was lost?
        record = await services.imports.update(record.tenant, record.id, validating)
    return _body(record, parts)


@router.delete("/v1/imports/{import_id}")
async def give_up(import_id: ImportId, caller: CallerDep, runtime: RuntimeDep) -> Json:
    """Give an import up; its parts are gone with the next sweep. 409 once it is being published or has ended."""
    record = await _found(runtime, caller, import_id)

    def rejected(found: ImportRecord) -> ImportRecord:
        if found.state is VersionState.VALIDATING:
            raise InUse("It is being checked and published: it is too late to give it up.")
        fault = ImportFault(code="given_up", message="It was given up.")
        return found.changed(state=VersionState.REJECTED, fault=fault, lease=None)

    return _body(await runtime.services.imports.update(record.tenant, record.id, rejected), None)


async def _check_files(runtime: Runtime, record: ImportRecord) -> None:
    """What cannot end well is refused before gigabytes are sent."""
    services, size = runtime.services, record.size_bytes
    names = [entry.path for entry in record.files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"'{twice}' is there twice.", code="invalid_value", param="files")
    if size > services.max_upload_bytes:
        raise PayloadTooLarge(f"The files have {size} bytes; {services.max_upload_bytes} are taken here.")
    quota = (await services.tenants.get_tenant(record.tenant)).quota.storage_bytes
    if quota is not None and size:
        # Equal content counts once, so whether it fits beside what is stored is known when it is there; but not more may be
        # on its way at once than there may be.
        page = await services.imports.list(record.tenant, PageQuery(limit=IMPORTS_KEPT))
        coming = sum(each.size_bytes for each in page.items if not each.has_ended)
        if coming + size > quota:
            raise storage_full(quota, await services.store.stored_bytes(record.tenant), coming + size)


async def _found(runtime: Runtime, caller: Caller, import_id: str) -> ImportRecord:
    tenant = caller.acting_tenant(Role.PUBLISHER)
    if not re.fullmatch(r"imp-[0-9a-f]{24}", import_id):
        raise no_import(import_id)
    return await runtime.services.imports.get(tenant, import_id)


async def _receive(request: Request, path: FilePath, expected: int) -> str:
    """Write the body, which must have `expected` bytes, and return its sha256."""
    digest, received = hashlib.sha256(), 0
    with path.open("xb") as file:
        async for chunk in request.stream():
            received += len(chunk)
            if received > expected:
                break
            digest.update(chunk)
            await run_to_end(partial(_write, file, chunk))
    if received != expected:
        raise InvalidRequest(
            f"This part has {expected} bytes, and {'more' if received > expected else received} came.",
            code="wrong_part_size",
            param="body",
        )
    return digest.hexdigest()


def _write(file: BinaryIO, chunk: bytes) -> None:
    file.write(chunk)


def _sha256_of(header: str) -> str:
    found = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", header)
    try:
        digest = base64.b64decode(found.group(1), validate=True) if found else b""
    except binascii.Error:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise InvalidRequest(
            "'Content-Digest' is written as sha-256=:<base64>: (RFC 9530).",
            code="invalid_value",
            param="Content-Digest",
        )
    return digest.hex()


def _missing(entry: FileEntry, parts: Mapping[tuple[str, int], str]) -> list[int]:
    return [index for index in range(part_count(entry.size)) if (entry.path, index) not in parts]


def _body(record: ImportRecord, parts: Mapping[tuple[str, int], str] | None) -> Json:
    """`parts`: those that are here; None leaves out which are missing."""
    is_open = parts is not None and record.state is VersionState.REGISTERED
    files = [
        {**entry.model_dump(), "parts": part_count(entry.size)}
        | ({"missing_parts": _missing(entry, parts or {})} if is_open else {})
        for entry in record.files
    ]
    return {
        "id": record.id,
        "object": "adapter.import",
        "created_at": record.created_at.isoformat(),
        "name": record.name,
        "base": record.base,
        "labels": record.wish.labels,
        "state": record.state,
        "source": record.source or None,
        "part_bytes": PART_BYTES,
        "files": files,
        "received_bytes": record.received_bytes if record.source else None,
        "version": record.version,
        "new": record.is_new,
        "error": None if record.fault is None else record.fault.model_dump(),
    }
