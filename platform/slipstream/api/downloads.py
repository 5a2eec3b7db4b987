"""Sending a blob: checked before the first byte leaves, streamed from the disk, and nothing left behind."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import BinaryIO
from urllib.parse import quote

from fastapi.responses import StreamingResponse

from slipstream.api.services import ApiServices
from slipstream.api.uploads import DATA, scratch_folder
from slipstream.publishing import run_to_end

_CHUNK_BYTES = 1 << 18
_MEDIA_TYPES = {
    ".csv": "text/csv; charset=utf-8",
    ".jinja": "text/plain; charset=utf-8",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown; charset=utf-8",
    ".png": "image/png",
    ".txt": "text/plain; charset=utf-8",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}


async def send_file(services: ApiServices, tenant: str, *, name: str, sha256: str, size: int) -> StreamingResponse:
    """A blob of `size` bytes as a download called `name`. It is a tenant's and may be anything: browsers are told to
    keep it, not to show it. Raises the blob store's errors while the status can still be chosen."""
    async with scratch_folder(services.upload_dir) as folder:
        await services.blobs.fetch_file(tenant, sha256, folder / DATA)
        # Opened and then unlinked with its folder: however the download ends, nothing is left.
        content = await run_to_end(lambda: (folder / DATA).open("rb"))
    headers = {
        "content-length": str(size),
        "content-disposition": f"attachment; filename*=utf-8''{quote(name, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_chunks(content), media_type=media_type(name), headers=headers)


def media_type(name: str) -> str:
    """What a file of this name holds, by its ending."""
    dot = name.rfind(".")
    return _MEDIA_TYPES.get(name[dot:].lower() if dot >= 0 else "", "application/octet-stream")


async def _chunks(content: BinaryIO) -> AsyncGenerator[bytes]:
    with content:
        while chunk := await run_to_end(lambda: content.read(_CHUNK_BYTES)):
            yield chunk
