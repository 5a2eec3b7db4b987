"""A tar or zip of an adapter's folder: unpacked without trusting a word of it.

An archive may claim any size, name and kind of its members, unpack to a thousand times its own size, and hold headers that
are larger than the memory. So: members are counted and their bytes are counted as they come, none is read at once, and what
is no plain file in one flat folder is refused. Nothing is written outside the folder that is given.
"""

from __future__ import annotations

import gzip
import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Protocol, cast

from slipstream.adapters.folder import MAX_FILES, is_file_name
from slipstream.adapters.rejection import Rule, reject, show
from slipstream.errors import AdapterRejected

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_CHUNK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20  # of a tar's extended headers, and of a zip's directory: sixty-four names need far less
_MAX_TAR_HEADER_BYTES = 128 << 10  # of all that stands before one member
_MAX_MEMBERS = 4 * MAX_FILES  # folders and macOS's own files among them
_UNPACKED = ".unpacked"


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of an archive."""

    path: str
    size: int  # as the archive says
    name: object  # how the archive knows it


class _Archive(Protocol):
    def members(self) -> Iterator[_Member]: ...

    def open(self, member: _Member) -> IO[bytes]: ...


def is_archive(name: str) -> bool:
    """Whether a file of this name is taken for an archive."""
    return name.lower().endswith(SUFFIXES)


def unpacked(folder: Path, max_bytes: int) -> Path:
    """`folder`, or if all that it holds is an archive, a folder inside it with the archive's files.

    max_bytes: of all files together. Raises `AdapterRejected`.
    """
    names = [path.name for path in folder.iterdir()]
    if len(names) != 1 or not is_archive(names[0]):
        return folder
    inner = folder / _UNPACKED
    inner.mkdir()
    with _opened(folder / names[0], max_bytes) as archive:
        _unpack(archive, inner, max_bytes)
    return inner


def _unpack(archive: _Archive, folder: Path, max_bytes: int) -> None:
    members = list(archive.members())
    tops = {PurePosixPath(member.path).parts[0] for member in members if "/" in member.path}
    is_wrapped = len(tops) == 1 and tops.isdisjoint({"..", "/"}) and all("/" in member.path for member in members)
    left = max_bytes
    for member in members:
        name = member.path.partition("/")[2] if is_wrapped else member.path
        if "/" in name:
            reject(
                Rule.NESTED_FOLDER,
                f"{show(member.path)} lies in a folder within the archive. Pack one flat folder.",
                name,
            )
        if not is_file_name(name):
            reject(Rule.BAD_FILE_NAME, f"{show(name)} is not a safe file name.", show(name))
        if (folder / name).exists():
            reject(Rule.BAD_ARCHIVE, f"{show(name)} is in the archive twice.", name)
        with archive.open(member) as source, (folder / name).open("xb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    reject(Rule.ADAPTER_TOO_LARGE, f"The archive unpacks to more than {max_bytes} bytes.")
                target.write(chunk)


@contextmanager
def _opened(path: Path, max_bytes: int) -> Iterator[_Archive]:
    try:
        with ExitStack() as stack:
            file: BinaryIO = stack.enter_context(path.open("rb"))
            if path.name.lower().endswith(".zip"):
                _check_directory(path)
                yield _Zip(stack.enter_context(zipfile.ZipFile(file)))
            else:
                plain = path.name.lower().endswith(".tar")
                stream = _Sipped(file if plain else stack.enter_context(gzip.GzipFile(fileobj=file)))
                stream.left = _MAX_TAR_HEADER_BYTES
                opened = stack.enter_context(tarfile.open(fileobj=cast(Any, stream), mode="r:", errorlevel=1))
                yield _Tar(opened, stream, max_bytes)
    except AdapterRejected:
        raise
    except Exception as error:  # both modules raise what comes to mind on bytes that were made to break them
        reject(Rule.BAD_ARCHIVE, f"{path.name} is not the archive that its name says: {show(str(error))}.", path.name)


def _is_junk(path: str) -> bool:
    """What macOS puts into archives by itself."""
    return path.startswith("__MACOSX/") or path.rpartition("/")[2].startswith(("._", ".DS_Store"))


def _clean(path: str) -> str:
    """Without `./`; anything else that is no plain relative path is refused by its name later."""
    return re.sub(r"^(\./)+", "", path)


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._zip = archive

    def members(self) -> Iterator[_Member]:
        infos = self._zip.infolist()
        _check_count(len(infos))
        for info in infos:
            if info.is_dir() or _is_junk(info.filename):
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                reject(Rule.SYMLINK, f"{show(info.filename)} is a link or a special file.", show(info.filename))
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA may ask for gigabytes
                reject(Rule.BAD_ARCHIVE, f"{show(info.filename)} is compressed in an unusual way. Pack with deflate.")
            if info.flag_bits & 0x1:
                reject(Rule.BAD_ARCHIVE, "The archive is encrypted. Pack it without a password.")
            yield _Member(_clean(info.filename), info.file_size, info)

    def open(self, member: _Member) -> IO[bytes]:
        assert isinstance(member.name, zipfile.ZipInfo)
        return self._zip.open(member.name)


def _check_directory(path: Path) -> None:
    """`zipfile` reads the directory at a zip's end at once: however large the end of the file says that it is."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (22 + 0xFFFF)))
        tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail):
        reject(Rule.BAD_ARCHIVE, f"{path.name} is not a zip file, or it was cut short.", path.name)
    length = struct.unpack_from("<I", tail, at + 12)[0]
    if length > _MAX_HEADER_BYTES or tail[max(0, at - 20) : at].startswith(b"PK\6\7"):
        reject(Rule.BAD_ARCHIVE, f"{path.name} has more in it than an adapter's folder.", path.name)


class _Tar:
    def __init__(self, archive: tarfile.TarFile, stream: _Sipped, max_bytes: int) -> None:
        self._tar = archive
        self._stream = stream
        self._max_bytes = max_bytes

    def members(self) -> Iterator[_Member]:
        count, total = 0, 0
        while (info := self._next()) is not None:
            count += 1
            _check_count(count)
            path = _clean(info.name)
            total += info.size
            if total > self._max_bytes:  # before it is passed over, which would unzip it
                reject(Rule.ADAPTER_TOO_LARGE, f"The archive unpacks to more than {self._max_bytes} bytes.")
            if info.size < 0:
                raise tarfile.ReadError("a member has less than no bytes")
            if info.isdir() or _is_junk(path):
                continue
            if not info.isreg() or info.issparse():
                reject(Rule.SYMLINK, f"{show(info.name)} is a link or a special file.", show(info.name))
            yield _Member(path, info.size, info)

    def _next(self) -> tarfile.TarInfo | None:
        self._stream.left = _MAX_TAR_HEADER_BYTES
        found = self._tar.next()
        self._stream.left = None
        return found

    def open(self, member: _Member) -> IO[bytes]:
        assert isinstance(member.name, tarfile.TarInfo)
        found = self._tar.extractfile(member.name)
        assert found is not None  # a regular file
        return found


class _Sipped:
    """A file that nobody may read at once, nor too much of for one header: `tarfile` reads headers of whatever length, and
    maps of whatever number of holes, they say that they have."""

    left: int | None = None  # bytes that may still be read; None = any number

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES or (self.left is not None and size > self.left):
            raise ValueError("a header is too large")
        if self.left is not None:
            self.left -= size
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _check_count(count: int) -> None:
    if count > _MAX_MEMBERS:
        reject(Rule.ADAPTER_TOO_LARGE, f"The archive has more than {_MAX_MEMBERS} members. Keep only the adapter's.")
