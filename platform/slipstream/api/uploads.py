"""Multipart uploads, streamed to disk as they arrive: nothing is held in memory, nothing is left behind.

Not Starlette's form parser: it spools to the system's temporary folder under its own limits, and shows nothing before
the whole body has been read.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from slipstream.errors import InvalidRequest, Unavailable
from slipstream.publishing import run_to_end

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")  # as `FileEntry.path`: flat
_MAX_FILES = 64
_MAX_TEXT_BYTES = 256 << 10  # of a field that is not a file: as much as there may be, in any script
_WRITE_BYTES = 1 << 20  # handed to the disk at a time: one hop to a thread per MiB
_PREFIX = "upload-"
_ABANDONED_S = 24 * 3600.0  # older than any upload: its process was killed


@dataclass(frozen=True, slots=True)
class FormShape:
    """Which parts a form has, and what to say about others."""

    files: str  # the field of its file parts
    needed: tuple[str, ...]  # text fields
    others: tuple[str, ...] = ()  # text fields that may be left out
    one_file: bool = False  # whatever it is called: it is stored as `DATA`
    summary: str = ""


ADAPTER_FORM = FormShape(
    "files",
    ("name",),
    ("base", "speculation", "speculation_reason", "labels", "lineage", "smoke"),
    summary="one 'name', one 'files' per file, and if need be 'base', 'speculation', 'speculation_reason', 'labels', "
    "'lineage' and 'smoke'",
)
DATA_FORM = FormShape("file", ("purpose",), one_file=True, summary="one 'file' and its 'purpose'")
DATA = "data"


@dataclass(frozen=True, slots=True)
class Upload:
    """A received form: its text fields, and a folder that holds its files and nothing else."""

    fields: dict[str, str]
    folder: Path
    names: tuple[str, ...] = ()  # of the files, as the client wrote them


def prepare_upload_dir(folder: Path) -> None:
    """Make the folder, and free it of what killed processes left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(_PREFIX + "*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


@asynccontextmanager
async def receive_upload(request: Request, upload_dir: Path, shape: FormShape = ADAPTER_FORM) -> AsyncGenerator[Upload]:
    """Read the form into a folder of its own, which is gone afterwards, whatever happens."""
    boundary = _boundary(request, shape)
    async with scratch_folder(upload_dir) as folder:
        form = _Form(folder, shape)
        try:
            await _read(request, MultipartParser(boundary, form.callbacks()), form)
            form.check_complete()
            yield Upload(form.fields, folder, tuple(form.names))
        finally:
            form.close()


@asynccontextmanager
async def scratch_folder(upload_dir: Path) -> AsyncGenerator[Path]:
    """A folder that is gone afterwards, whatever happens; one of a killed process goes at a later start."""
    folder = await run_to_end(lambda: _make_folder(upload_dir))
    try:
        yield folder
    finally:
        await run_to_end(lambda: shutil.rmtree(folder, ignore_errors=True))


def _boundary(request: Request, shape: FormShape) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 256:
        raise InvalidRequest(f"Send multipart/form-data: {shape.summary}.")
    return boundary


async def _read(request: Request, parser: MultipartParser, form: _Form) -> None:
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += chunk
        if len(waiting) >= _WRITE_BYTES:
            await run_to_end(partial(_parse, parser, bytes(waiting)))
            waiting.clear()
    await run_to_end(partial(_parse, parser, bytes(waiting)))
    if not form.ended:
        raise InvalidRequest("The upload ended before its last part did. Send it again.", code="incomplete_upload")


def _parse(parser: MultipartParser, data: bytes) -> None:
    try:
        parser.write(data)
    except FormParserError as error:
        raise InvalidRequest("The body is not well-formed multipart/form-data.", code="invalid_multipart") from error
    except OSError as error:  # the disk is full, for one
        raise Unavailable("The server cannot store the upload right now. Try again later.") from error


def _make_folder(upload_dir: Path) -> Path:
    upload_dir.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=upload_dir))


@dataclass(slots=True)
class _Form:
    """What the parser's callbacks build. Runs in a thread, one call at a time."""

    folder: Path
    shape: FormShape
    fields: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    ended: bool = False
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _disposition: bytes = b""
    _file: BinaryIO | None = None
    _field: str = ""
    _text: bytearray = field(default_factory=bytearray)

    def callbacks(self) -> MultipartCallbacks:
        """By the parser's names."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def check_complete(self) -> None:
        """Raise `InvalidRequest` unless every needed field came."""
        missing = [name for name in self.shape.needed if name not in self.fields]
        if missing or not self.names:
            param = missing[0] if missing else self.shape.files
            raise InvalidRequest(f"The field '{param}' is missing: send {self.shape.summary}.", param=param)

    def close(self) -> None:
        """Close the file being written, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._disposition = b""
        self._text.clear()

    def _header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == self.shape.files:
            self._file = (self.folder / self._file_name(options.get(b"filename", b""))).open("xb")
        elif self._field not in (*self.shape.needed, *self.shape.others) or self._field in self.fields:
            raise InvalidRequest(
                f"Unexpected form field '{self._field[:80]}': send {self.shape.summary}.", param=self._field[:80]
            )

    def _file_name(self, raw: bytes) -> str:
        name = raw.decode("utf-8", "replace")
        if self.shape.one_file:
            return self._only_file(name)
        if not _FILE_NAME.fullmatch(name):
            raise InvalidRequest(
                f"'{name[:80]}' is not a file name that is taken here: no folders; letters, digits, '.', '_' and '-'.",
                code="invalid_file_name",
                param="files",
            )
        if name in self.names:
            raise InvalidRequest(f"The file '{name}' was sent twice.", param="files")
        if len(self.names) >= _MAX_FILES:
            raise InvalidRequest(f"An adapter has {_MAX_FILES} files at most.", param="files")
        self.names.append(name)
        return name

    def _only_file(self, name: str) -> str:
        if self.names:
            raise InvalidRequest("Send one file at a time.", param=self.shape.files)
        name = name.replace("\\", "/").rpartition("/")[2]  # some clients send a whole path
        if not 0 < len(name) <= 255 or not name.isprintable():
            raise InvalidRequest(
                "The file needs a name of 1 to 255 printable characters, such as train.jsonl.",
                code="invalid_file_name",
                param=self.shape.files,
            )
        self.names.append(name)
        return DATA

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_TEXT_BYTES:
            raise InvalidRequest(f"The field '{self._field}' is too long.", param=self._field)

    def _end(self) -> None:
        if self._file is not None:
            self.close()
        else:
            self.fields[self._field] = self._text.decode("utf-8", "replace")

    def _finish(self) -> None:
        self.ended = True
