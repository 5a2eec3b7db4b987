"""A prepared model's folder: built aside, moved into place whole, and checked against a marker on every later start.

The marker `slipstream-model.json` is written last and holds every file's size and sha256, so that a half-written or
damaged folder is noticed and made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MARKER = "slipstream-model.json"
_CHUNK_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """Hash a file without holding it in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_marker(folder: Path, model_id: str, source: Mapping[str, str]) -> None:
    """Record what is in `folder` and what it was made from."""
    files = {
        p.name: {"size": p.stat().st_size, "sha256": file_sha256(p)}
        for p in sorted(folder.iterdir())
        if p.name != MARKER
    }
    body = {"format": 1, "id": model_id, "source": dict(source), "files": files}
    (folder / MARKER).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def read_marker(folder: Path) -> dict[str, object] | None:
    """The marker, or None when there is none that can be read."""
    try:
        body = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def is_intact(folder: Path, source: Mapping[str, str]) -> bool:
    """Whether every file is as the marker says, and the folder was made from this very source."""
    marker = read_marker(folder)
    if marker is None or marker.get("format") != 1 or marker.get("source") != dict(source):
        return False
    files = marker.get("files")
    if not isinstance(files, dict) or not files:
        return False
    return all(_matches(folder / name, entry) for name, entry in files.items())


def _matches(path: Path, entry: object) -> bool:
    if not isinstance(entry, dict) or not path.is_file() or path.stat().st_size != entry.get("size"):
        return False
    return file_sha256(path) == entry.get("sha256")


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold `lock` against other processes; the kernel lets go of it when this process dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A scratch folder on the same file system as `final`, gone afterwards whatever happens."""
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def move_into_place(built: Path, final: Path) -> None:
    """Rename `built` to `final`, replacing what is there. The caller holds the lock."""
    old = built.parent / "replaced"
    if final.exists():
        final.rename(old)
    built.rename(final)


def sweep_scratch(final: Path) -> None:
    """Remove what a killed process left beside `final`. The caller holds the lock, so nobody is using it."""
    for left in final.parent.glob(f".{final.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
