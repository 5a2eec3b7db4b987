"""Where an adapter may be pulled from: buckets (`s3://`, `gs://`, `az://`) and the Hugging Face hub (`hf://owner/name@revision`).

The gateway reads with its own credentials, so what tenants may name is a setting: URLs that begin with one of
`SLIPSTREAM_PULL_SOURCES`, and never the registry's own blobs. From the hub it reads as nobody in particular.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import obstore
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its HTTP library's root, and so its own's
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError

from adapter_registry.blobs import BUCKETS, open_bucket
from slipstream.adapters.folder import MAX_FILES, is_file_name
from slipstream.adapters.rejection import Rule, reject, show
from slipstream.errors import InvalidRequest, Unavailable
from slipstream.importing.sources import Progress, Sources
from slipstream.publishing import run_to_end

SCHEMES = (*BUCKETS, "hf")
_RETRY_S = 30.0
_CHUNK_BYTES = 8 << 20
_HUB_FOLDER = ".hub"
_BUCKET_URL = re.compile(
    r"[a-z0-9]+://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._=+-]+)*/?"
)  # nothing that a parser might undo
_HUB_NAME = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:@([A-Za-z0-9._/-]{1,100}))?"
)


@dataclass(frozen=True, slots=True)
class RemoteSources(Sources):
    """The real ones."""

    allowed: Sequence[str]  # URLs begin with one of these
    blob_url: str = ""  # the registry's own, which nobody may read past it
    hub: str | None = None  # address of the Hugging Face hub; None = huggingface.co, or HF_ENDPOINT

    def check(self, url: str) -> None:
        """Raise `InvalidRequest` for what may not be pulled."""
        scheme, _, rest = url.partition("://")
        own = self.blob_url.rstrip("/")
        if scheme not in SCHEMES or not rest:
            raise _refused(f"'source' is a URL that begins with {', '.join(f'{each}://' for each in SCHEMES)}.")
        if scheme == "hf" and not _HUB_NAME.fullmatch(rest):
            raise _refused(
                "A source on the Hugging Face hub is written as hf://owner/name or hf://owner/name@revision."
            )
        if scheme != "hf" and (not _BUCKET_URL.fullmatch(url) or {".", ".."} & set(rest.split("/"))):
            raise _refused("A bucket's folder is written as s3://bucket/folder, of letters, digits and '._=+-'.")
        # With a slash behind both: `s3://models` must not open `s3://models-of-others`.
        place = f"{url.partition('@')[0].rstrip('/')}/"
        is_allowed = any(
            place.startswith(f"{prefix.rstrip('/')}/") or prefix == f"{scheme}://" for prefix in self.allowed
        )
        if not is_allowed or (own and place.startswith(f"{own}/")):
            raise _refused(
                f"'{url[:200]}' is not among the places that this server pulls from. Ask its operator to add it to "
                "SLIPSTREAM_PULL_SOURCES, or upload the files.",
                code="source_not_allowed",
            )

    async def fetch(self, url: str, folder: Path, max_bytes: int, progress: Progress) -> str:
        """Put the files at `url` into an empty folder; returns the URL of exactly what came."""
        self.check(url)  # settings may have changed since it was asked for
        if url.startswith("hf://"):
            return await _from_hub(url, folder, max_bytes, progress, self.hub)
        try:
            return await _from_bucket(url, folder, max_bytes, progress)
        except (NotFoundError, FileNotFoundError):
            raise _missing(url) from None
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise _refused(f"This server may not read '{url[:200]}'.", code="source_forbidden") from error
        except (BaseError, OSError) as error:
            raise Unavailable(f"'{url[:200]}' could not be read.", code="source_unavailable") from error


async def _from_bucket(url: str, folder: Path, max_bytes: int, progress: Progress) -> str:
    store = open_bucket(url, _RETRY_S)
    listing: Any = await obstore.list_with_delimiter_async(store)
    sizes = {entry["path"].rpartition("/")[2]: int(entry["size"]) for entry in listing["objects"]}
    sizes = {name: size for name, size in sizes.items() if name and not name.startswith(".")}
    if not sizes:
        raise _missing(url)
    paths = {entry["path"].rpartition("/")[2]: entry["path"] for entry in listing["objects"]}
    _check(sizes, max_bytes)
    received = 0
    for name in sorted(sizes):
        chunks = aiter((await obstore.get_async(store, paths[name])).stream(min_chunk_size=_CHUNK_BYTES))
        with (folder / name).open("xb") as file:
            async for chunk in chunks:
                received += len(chunk)
                if received > max_bytes:  # it grew while it was read
                    _check({name: received}, max_bytes)
                await run_to_end(lambda data=chunk: file.write(data))  # type: ignore[misc]  # bound now
                progress(received)
    return url


async def _from_hub(url: str, folder: Path, max_bytes: int, progress: Progress, hub: str | None) -> str:
    name = _HUB_NAME.fullmatch(url.removeprefix("hf://"))
    assert name is not None  # `check` saw to it
    repo, revision = name.groups()
    try:
        info = await run_to_end(
            lambda: HfApi(endpoint=hub, token=False).model_info(repo, revision=revision, files_metadata=True)
        )
        sizes = {
            each.rfilename: each.size or 0
            for each in info.siblings or []
            if "/" not in each.rfilename and not each.rfilename.startswith(".")
        }
        _check(sizes, max_bytes)
        received = 0
        for file in sorted(sizes):  # one after the other: whoever gives up waits for one of them at most
            received += await run_to_end(partial(_download, repo, file, info.sha, folder, hub))
            _check({file: received}, max_bytes)
            progress(received)
    except (RepositoryNotFoundError, RevisionNotFoundError):  # private ones look the same
        raise _missing(url) from None
    except (HTTPError, OSError) as error:
        raise Unavailable(f"'{url[:200]}' could not be read.", code="source_unavailable") from error
    except ValueError as error:  # a name that the hub's own rules do not allow
        raise _refused(f"'{url[:200]}' cannot be on the hub.") from error
    finally:
        await run_to_end(lambda: shutil.rmtree(folder / _HUB_FOLDER, ignore_errors=True))
    return f"hf://{repo}@{info.sha}"


def _download(repo: str, file: str, revision: str | None, folder: Path, hub: str | None) -> int:
    path = hf_hub_download(repo, file, revision=revision, token=False, local_dir=folder / _HUB_FOLDER, endpoint=hub)
    Path(path).rename(folder / file)
    return (folder / file).stat().st_size


def _check(sizes: dict[str, int], max_bytes: int) -> None:
    for name in sizes:
        if not is_file_name(name):
            reject(Rule.BAD_FILE_NAME, f"{show(name)} is not a safe file name.", show(name))
    if len(sizes) > MAX_FILES:
        reject(Rule.ADAPTER_TOO_LARGE, f"The source has {len(sizes)} files; an adapter has {MAX_FILES} at most.")
    if sum(sizes.values()) > max_bytes:
        reject(Rule.ADAPTER_TOO_LARGE, f"The source has {sum(sizes.values())} bytes; {max_bytes} are taken here.")


def _refused(message: str, code: str = "invalid_value") -> InvalidRequest:
    return InvalidRequest(message, code=code, param="source")


def _missing(url: str) -> InvalidRequest:
    return _refused(f"There is nothing at '{url[:200]}' that this server may see.", code="source_not_found")
