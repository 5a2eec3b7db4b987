"""A version's files on their way in: checked against the registry's list, never half there, never outside the folder."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from adapter_registry.errors import InvalidName
from adapter_registry.records import FileEntry, VersionSelector, parse_reference
from slipstream.client.references import to_reference
from slipstream.errors import InvalidRequest, NotFound, Unavailable

Json = dict[str, Any]


def selector_of(reference: str) -> VersionSelector:
    """A version as people write it: `sql`, `sql@3`, `sql/3`, `sql@prod`. Raises `InvalidRequest`."""
    try:
        return parse_reference(to_reference(reference))
    except InvalidName as error:
        raise InvalidRequest(str(error), param="reference") from error


def pick_version(adapter: Json, selector: VersionSelector) -> Json:
    """The version that a reference means, out of an adapter's versions. Raises `NotFound`."""
    wanted: Mapping[str, tuple[str, object]] = {
        "default": ("version", adapter["current"]),
        "version": ("version", selector.version),
        "alias": ("version", adapter["aliases"].get(selector.alias)),
        "digest": ("digest", selector.digest),
    }
    field, value = wanted[selector.by]
    found = next((each for each in adapter["versions"] if each[field] == value), None)
    if found is None or selector.tenant not in (None, adapter["tenant"]):
        raise NotFound(f"There is no such version of '{adapter['name']}'. 'slipstream adapters show' lists them.")
    return dict(found)


def files_of(version: Json) -> Sequence[FileEntry]:
    """Every file of a version. Raises `Unavailable` when the answer is not one that this client understands."""
    keys = ("path", "size", "sha256")
    try:
        rows = [{key: row[key] for key in keys} for row in (*version["files"], *version["attachments"])]
        return [FileEntry.model_validate(row) for row in rows]
    except (ValidationError, KeyError, TypeError) as error:
        raise Unavailable(
            "The server's list of files is not one that this client understands. Upgrade slipstream here."
        ) from error


def prepare_folder(folder: Path, files: Sequence[FileEntry]) -> Sequence[FileEntry]:
    """Make the folder; returns what is still to be fetched. Raises `InvalidRequest` when something else is in there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be made ({error.strerror}).", param="folder") from error
    expected = {entry.path: entry for entry in files}
    there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in there:
        entry = expected.pop(path.name, None)
        if entry is None or not path.is_file() or _sha256(path) != entry.sha256:
            raise InvalidRequest(f"{path} is not a file of this version. Give an empty folder.", param="folder")
    return list(expected.values())


async def save(chunks: AsyncIterator[bytes], entry: FileEntry, folder: Path, count: Callable[[int], None]) -> None:
    """Write a download under its name, once all of it is there and right. Raises `Unavailable` when it is not."""
    with _Partial(folder, entry) as file:
        async for chunk in chunks:
            file.add(chunk)
            count(len(chunk))
        file.finish()


class _Partial:
    """A hidden file that takes its name only when its content is what was promised, and is gone otherwise."""

    def __init__(self, folder: Path, entry: FileEntry) -> None:
        self._path = folder / f".{entry.path[:200]}.part"
        self._entry = entry
        self._size = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, chunk: bytes) -> None:
        """The next bytes; more than were announced are not written."""
        self._size += len(chunk)
        if self._size > self._entry.size:
            raise self._damaged()
        self._digest.update(chunk)
        self._file.write(chunk)

    def finish(self) -> None:
        """Check, and take the name."""
        if self._size != self._entry.size or self._digest.hexdigest() != self._entry.sha256:
            raise self._damaged()
        self._file.close()
        self._path.replace(self._path.with_name(self._entry.path))

    def _damaged(self) -> Unavailable:
        return Unavailable(f"'{self._entry.path}' was damaged on its way here. Try again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
