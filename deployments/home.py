"""The data folder of a local installation: who owns it, where things lie in it, and the secrets it keeps."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slipstream.errors import ConfigError

_PRIVATE_FOLDER = 0o700
_PRIVATE_FILE = 0o600


@dataclass(frozen=True, slots=True)
class Home:
    """Paths inside the data folder."""

    root: Path

    @property
    def redis(self) -> Path:
        """The embedded server's append-only file, password and state."""
        return self.root / "redis"

    @property
    def blobs(self) -> Path:
        """Adapter files by tenant and sha256."""
        return self.root / "blobs"

    @property
    def uploads(self) -> Path:
        """Uploads on their way in; anything left here is garbage."""
        return self.root / "uploads"

    @property
    def adapter_cache(self) -> Path:
        """Adapters that a replica has fetched."""
        return self.root / "cache" / "adapters"

    @property
    def logs(self) -> Path:
        """What Serve, Ray and Redis have to say."""
        return self.root / "logs"

    @property
    def scratch_note(self) -> Path:
        """Names the temporary folder in use, so that the next start can remove it after a crash."""
        return self.root / "scratch"


@contextmanager
def open_home(root: Path) -> Iterator[Home]:
    """Make the folder and own it: two servers on one data folder would corrupt it, so the second is refused."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
        # Python opens it non-inheritable: a child that outlives us does not keep the lock.
        stream = (root / "lock").open("a+")
    except OSError as error:
        raise ConfigError(
            f"The data folder {root} cannot be written ({error.strerror}). Set SLIPSTREAM_HOME to one that can."
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            owner = stream.read(20).strip()
            raise ConfigError(
                f"Slipstream is already running on {root}{f' (process {owner})' if owner else ''}. "
                "Stop it first, or set SLIPSTREAM_HOME to another folder."
            ) from error
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield Home(root)


def kept_secret(path: Path, make: Callable[[], str] = lambda: secrets.token_urlsafe(32)) -> str:
    """The secret in `path`, made on first use; only its owner can read the file."""
    if path.is_file():
        secret = path.read_text(encoding="utf-8").strip()
        if secret:
            return secret
    secret = make()
    write_secret(path, secret)
    return secret


def write_secret(path: Path, secret: str) -> None:
    """Write a secret so that it is never readable by others, not even for a moment, nor half written."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
    partial = path.with_name(f".{path.name}.new")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_FILE)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(secret + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
