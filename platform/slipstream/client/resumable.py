"""Uploads that survive broken connections, and pulls: how `slipstream adapters push` sends large folders, and URLs."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from adapter_registry.records import VersionState
from slipstream.client.slipstream_client import Json, Progress, SlipstreamClient, adapter_files
from slipstream.errors import AdapterRejected, InvalidRequest, ServerError

WORTH_RESUMING = 64 << 20  # bytes; smaller folders go in one request
TRIES = 6  # of a part
_PAUSE_S = 0.5  # before the second try, and twice that before each further one
_POLL_S = 0.3


def is_worth_resuming(path: Path) -> bool:
    """Whether it is better sent in parts: an archive, or a folder so large."""
    return path.is_file() or sum(file.stat().st_size for file in adapter_files(path)) >= WORTH_RESUMING


async def push_in_parts(
    client: SlipstreamClient,
    path: Path,
    name: str,
    progress: Progress = lambda sent, total: None,
    **wishes: Any,
) -> tuple[Json, bool]:
    """Publish a folder, or an archive of one; returns the version and whether it is new.

    Run again after it was cut off, with the same files and name, it sends what is missing. `wishes`: other fields of
    POST /v1/imports. Raises `AdapterRejected` with the server's reason, and what the last try of a part raised.
    """
    files, entries = await asyncio.to_thread(_listed, path)
    found = await _begun_before(client, name, entries, wishes) or await client.begin_import(
        name=name, files=entries, **wishes
    )
    total = sum(entry["size"] for entry in entries)
    missing = {entry["path"]: list(entry["missing_parts"]) for entry in found["files"]}
    size = found["part_bytes"]
    left = sum(min(size, e["size"] - i * size) for e in entries for i in missing[e["path"]])
    progress(total - left, total)
    for file in files:
        for index in missing[file.name]:
            data = await asyncio.to_thread(partial(_read, file, index * size, size))
            await _patiently(partial(client.put_part, found["id"], file.name, index, data))
            left -= len(data)
            progress(total - left, total)
    await _patiently(partial(client.complete_import, found["id"]))
    return await outcome(client, found["id"])


async def pull_from(
    client: SlipstreamClient,
    source: str,
    name: str,
    progress: Progress = lambda received, total: None,
    **wishes: Any,
) -> tuple[Json, bool]:
    """Have the server fetch an adapter; returns the version and whether it is new. Raises `AdapterRejected`."""
    begun = await client.begin_import(name=name, source=source, **wishes)
    return await outcome(client, begun["id"], lambda found: progress(found["received_bytes"] or 0, 0))


async def outcome(
    client: SlipstreamClient, import_id: str, look: Callable[[Json], None] = lambda found: None
) -> tuple[Json, bool]:
    """Wait until an import has ended; returns its version and whether it is new. Raises `AdapterRejected`."""
    while True:
        found: Json = await _patiently(partial(client.get_import, import_id))
        look(found)
        if found["state"] == VersionState.REJECTED:
            error = found["error"]
            raise AdapterRejected(error["message"], code=error["code"], param=error["param"])
        if found["state"] == VersionState.READY:
            adapter = await client.get_adapter(found["name"])
            version = next((v for v in adapter["versions"] if v["ref"] == found["version"]), None)
            if version is None:
                raise InvalidRequest(f"{found['version']} was published, and has been deleted since.")
            return version, bool(found["new"])
        await asyncio.sleep(_POLL_S)


async def _begun_before(
    client: SlipstreamClient, name: str, entries: Sequence[Json], wishes: Mapping[str, Any]
) -> Json | None:
    """An upload of the same, for which the same was wished, that was cut off."""
    if set(wishes) - {"base", "labels"}:  # what an import does not show cannot be compared
        return None
    wanted = (name, wishes.get("base"), wishes.get("labels") or {})
    for each in await client.list_imports():
        same = [{key: file[key] for key in ("path", "size", "sha256")} for file in each["files"]] == list(entries)
        if each["state"] == VersionState.REGISTERED and (each["name"], each["base"], each["labels"]) == wanted and same:
            return await client.get_import(each["id"])
    return None


async def _patiently(call: Callable[[], Any]) -> Any:
    pause_s = _PAUSE_S
    for _ in range(TRIES - 1):
        try:
            return await call()
        except ServerError:  # not reached, or not now
            await asyncio.sleep(pause_s)
            pause_s *= 2
    return await call()


def _listed(path: Path) -> tuple[list[Path], list[Json]]:
    files = [path] if path.is_file() else adapter_files(path)
    return files, [_entry(file) for file in files]


def _entry(file: Path) -> Json:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        return {"path": file.name, "size": content.tell(), "sha256": digest}


def _read(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as content:
        content.seek(offset)
        return content.read(size)
