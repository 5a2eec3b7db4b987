"""`SlipstreamClient`: publish and manage adapters and keys over HTTP."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from slipstream.adapters.folder import check_is_file
from slipstream.client.failures import error_of
from slipstream.errors import InvalidRequest, Unavailable

Json = dict[str, Any]
Progress = Callable[[int, int], None]  # bytes sent so far, bytes of all files
_TIMEOUT = httpx.Timeout(30.0, read=600.0, write=120.0)  # a large adapter is checked and stored before the answer comes


class SlipstreamClient:
    """An `async with` client; errors are those of `slipstream.errors`."""

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        tenant: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {_visible(api_key, 'API key')}"}
        if tenant is not None:  # only the admin key may name one
            headers["X-Slipstream-Tenant"] = _visible(tenant, "tenant")
        self._url = _checked_url(url)
        self._http = httpx.AsyncClient(base_url=self._url, headers=headers, timeout=_TIMEOUT, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def push(
        self, folder: Path, name: str, progress: Progress = lambda sent, total: None, *, base: str | None = None
    ) -> tuple[Json, bool]:
        """Publish a folder as a version of `name`; returns the version and whether it is new.

        Hidden files stay here; links and sub-folders (training checkpoints) are refused as the server would refuse them.
        `base` names the base model where the server has several.
        """
        fields = {"name": name} if base is None else {"name": name, "base": base}
        paths = adapter_files(folder)
        total, sent = sum(path.stat().st_size for path in paths), 0

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            progress(sent, total)

        with ExitStack() as stack:
            opened = [(path.name, stack.enter_context(_CountedFile(path, count))) for path in paths]
            files = [("files", (name_, file, "application/octet-stream")) for name_, file in opened]
            response = await self._send("POST", "/v1/adapters", data=fields, files=files)
        return response.json(), response.status_code == httpx.codes.CREATED

    async def list_adapters(self) -> list[Json]:
        """The tenant's adapters."""
        return list((await self._send("GET", "/v1/adapters")).json()["data"])

    async def get_adapter(self, name: str) -> Json:
        """One adapter with its versions and aliases."""
        return dict((await self._send("GET", f"/v1/adapters/{_part(name)}")).json())

    async def delete_adapter(self, name: str, version: int | None = None) -> Json:
        """Remove an adapter, or one of its versions."""
        path = f"/v1/adapters/{_part(name)}" + ("" if version is None else f"/versions/{version}")
        return dict((await self._send("DELETE", path)).json())

    async def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias at a version."""
        await self._send("PUT", f"/v1/adapters/{_part(name)}/aliases/{_part(alias)}", json={"version": version})

    async def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        await self._send("DELETE", f"/v1/adapters/{_part(name)}/aliases/{_part(alias)}")

    async def create_key(self, tenant: str, label: str = "") -> Json:
        """A new key; `secret` is in this answer only. Needs the admin key."""
        return dict((await self._send("POST", "/v1/keys", json={"tenant": tenant, "label": label})).json())

    async def list_keys(self, tenant: str) -> list[Json]:
        """A tenant's keys. Needs the admin key."""
        return list((await self._send("GET", "/v1/keys", params={"tenant": tenant})).json()["data"])

    async def revoke_key(self, tenant: str, key_id: str) -> None:
        """Take a key back. Needs the admin key."""
        await self._send("DELETE", f"/v1/keys/{_part(key_id)}", params={"tenant": tenant})

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **content)
        except UnicodeEncodeError as error:
            raise InvalidRequest("A name or label holds characters that are not text. Write it anew.") from error
        except httpx.TransportError as error:
            raise Unavailable(f"Cannot reach {self._url}: is the server running, and is this its address?") from error
        if response.is_error:
            raise error_of(response)
        return response


def adapter_files(folder: Path) -> list[Path]:
    """The files that a push sends. Raises `InvalidRequest` when there are none, `AdapterRejected` for what is no file."""
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is not a folder.", param="folder")
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in files:
        check_is_file(path.name, path.lstat().st_mode)
    if not files:
        raise InvalidRequest(
            f"{folder} holds no files: give the folder that PEFT's save_pretrained wrote.", param="folder"
        )
    return files


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidRequest(f"{url!r} is not a URL of a server, such as http://127.0.0.1:8000.", param="url")
    return url.rstrip("/").removesuffix("/v1")  # as OpenAI's clients want it written


def _visible(text: str, what: str) -> str:
    """Header values that httpx cannot send, or that would be cut or refused on the way."""
    if not re.fullmatch(r"[!-~]+", text):
        raise InvalidRequest(f"The {what} holds a character that it cannot have, such as a space. Copy it again.")
    return text


def _part(text: str) -> str:
    """One path segment. Dots alone would be resolved away before the request leaves: `..` must stay a refused name."""
    quoted = quote(text, safe="", errors="replace")  # bytes of the command line that are no text: a refused name too
    return quoted.replace(".", "%2E") if set(text) <= {"."} else quoted


class _CountedFile(io.FileIO):
    """Tells how much has been read. httpx reads 64 KiB at a time in the event loop: no hardship for a client."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(path)
        self._count = count

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._count(len(data))
        return data
