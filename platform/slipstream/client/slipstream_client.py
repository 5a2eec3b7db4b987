"""`SlipstreamClient`: publish and manage adapters and keys over HTTP."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from adapter_registry.records import SpeculationPolicy
from slipstream.adapters.folder import check_is_file
from slipstream.client.connect import TIMEOUT, checked_url, open_rows, path_part, visible
from slipstream.client.downloads import files_of, pick_version, prepare_folder, save, selector_of
from slipstream.client.failures import error_of
from slipstream.errors import InvalidRequest, Unavailable

Json = dict[str, Any]
Progress = Callable[[int, int], None]  # bytes sent or received so far, bytes of all files


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
        headers = {"Authorization": f"Bearer {visible(api_key, 'API key')}"}
        if tenant is not None:  # only the admin key may name one
            headers["X-Slipstream-Tenant"] = visible(tenant, "tenant")
        self._url = checked_url(url)
        self._http = httpx.AsyncClient(base_url=self._url, headers=headers, timeout=TIMEOUT, transport=transport)

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
        self,
        folder: Path,
        name: str,
        progress: Progress = lambda sent, total: None,
        *,
        base: str | None = None,
        speculation: SpeculationPolicy | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> tuple[Json, bool]:
        """Publish a folder as a version of `name`; returns the version and whether it is new.

        Hidden files stay here; links and sub-folders (training checkpoints) are refused as the server would refuse them.
        `base` names the base model where the server has several. `speculation` and `labels` are a new version's; one that
        has the same content already keeps its own.
        """
        fields = {"name": name} if base is None else {"name": name, "base": base}
        if speculation is not None:
            fields["speculation"] = "on" if speculation.enabled else "off"
            fields["speculation_reason"] = speculation.reason
        if labels:
            fields["labels"] = json.dumps(dict(labels))
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

    async def begin_import(self, **fields: Any) -> Json:
        """Begin an upload in parts, or a pull; the fields are those of POST /v1/imports."""
        return dict((await self._send("POST", "/v1/imports", json=fields)).json())

    async def get_import(self, import_id: str) -> Json:
        """An import as it stands."""
        return dict((await self._send("GET", f"/v1/imports/{path_part(import_id)}")).json())

    async def list_imports(self, limit: int = 100) -> list[Json]:
        """The tenant's imports, newest first."""
        return list((await self._send("GET", "/v1/imports", params={"limit": limit})).json()["data"])

    async def give_up_import(self, import_id: str) -> Json:
        """Give an import up."""
        return dict((await self._send("DELETE", f"/v1/imports/{path_part(import_id)}")).json())

    async def put_part(self, import_id: str, path: str, index: int, data: bytes) -> None:
        """Send one part of a file; again, if need be."""
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        headers = {"Content-Digest": f"sha-256=:{digest}:", "Content-Type": "application/octet-stream"}
        where = f"/v1/imports/{path_part(import_id)}/files/{path_part(path)}/parts/{index}"
        await self._send("PUT", where, content=data, headers=headers)

    async def complete_import(self, import_id: str) -> Json:
        """Every part is there."""
        return dict((await self._send("POST", f"/v1/imports/{path_part(import_id)}/complete")).json())

    async def list_adapters(self, labels: Mapping[str, str] | None = None) -> list[Json]:
        """The tenant's adapters; with `labels`, those that have a version with all of them."""
        params = {"label": [f"{key}={value}" for key, value in labels.items()]} if labels else None
        return list((await self._send("GET", "/v1/adapters", params=params)).json()["data"])

    async def get_adapter(self, name: str) -> Json:
        """One adapter with its versions and aliases."""
        return dict((await self._send("GET", f"/v1/adapters/{path_part(name)}")).json())

    async def delete_adapter(self, name: str, version: int | None = None) -> Json:
        """Remove an adapter, or one of its versions."""
        path = f"/v1/adapters/{path_part(name)}" + ("" if version is None else f"/versions/{version}")
        return dict((await self._send("DELETE", path)).json())

    async def set_speculation(self, name: str, version: int, *, enabled: bool, reason: str = "") -> Json:
        """Say whether requests with speculation `auto` draft with this version, and why; returns the version."""
        path = f"/v1/adapters/{path_part(name)}/versions/{version}/speculation"
        return dict((await self._send("PUT", path, json={"enabled": enabled, "reason": reason})).json())

    async def set_labels(self, name: str, version: int, labels: Mapping[str, str]) -> Json:
        """Replace a version's labels; returns the version."""
        path = f"/v1/adapters/{path_part(name)}/versions/{version}/labels"
        return dict((await self._send("PUT", path, json={"labels": dict(labels)})).json())

    async def fetch_files(
        self, reference: str, folder: Path, progress: Progress = lambda received, total: None
    ) -> Json:
        """Download all files of a version (`name`, `name@3`, `name@alias`), attachments too; returns the version.

        `folder` is made. What is there from an earlier try and right is kept; anything else in it is refused. Every
        file is checked against its sha256 before it takes its name. Raises `NotFound`, `InvalidRequest`, `Unavailable`.
        """
        selector = selector_of(reference)
        version = pick_version(await self.get_adapter(selector.name), selector)
        files = files_of(version)
        missing = prepare_folder(folder, files)
        total = sum(entry.size for entry in files)
        received = total - sum(entry.size for entry in missing)

        def count(size: int) -> None:
            nonlocal received
            received += size
            progress(received, total)

        progress(received, total)
        for entry in missing:
            path = (
                f"/v1/adapters/{path_part(selector.name)}/versions/{version['version']}/files/{path_part(entry.path)}"
            )
            async with self._receive(path) as response:
                await save(response.aiter_bytes(), entry, folder, count)
        return version

    async def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        split: tuple[int, float] | None = None,
        *,
        shadow: bool = False,
        guard: Mapping[str, Any] | None = None,
    ) -> None:
        """Point an alias at a version.

        split: another version, and its part of the requests in (0, 1), which it answers, or with `shadow` answers as well.
        guard: `max_error_rate`, `min_acceptance`, `min_requests`, `window_s`, as in PUT …/aliases/{alias}.
        """
        body: Json = {"version": version}
        if split is not None:
            body["split"] = {"version": split[0], "weight": split[1], "shadow": shadow}
        if guard is not None:
            body["guard"] = dict(guard)
        await self._send("PUT", f"/v1/adapters/{path_part(name)}/aliases/{path_part(alias)}", json=body)

    async def roll_back_alias(self, name: str, alias: str) -> Json:
        """Point an alias at the version before its last move."""
        path = f"/v1/adapters/{path_part(name)}/aliases/{path_part(alias)}/rollback"
        return dict((await self._send("POST", path)).json())

    async def alias_moves(self, name: str) -> list[Json]:
        """What became of an adapter's aliases, newest first."""
        return list((await self._send("GET", f"/v1/adapters/{path_part(name)}/aliases")).json()["data"])

    async def alias_outcomes(self, name: str) -> list[Json]:
        """What lately became of the requests of aliases that have a split or a guard, by version."""
        return list((await self._send("GET", f"/v1/adapters/{path_part(name)}/aliases")).json()["outcomes"])

    async def create_webhook(self, url: str, events: Sequence[str] = ()) -> Json:
        """Have an address told of what happens; `secret` is in this answer only. Needs a key of the role `admin`."""
        body: Json = {"url": url} | ({"events": list(events)} if events else {})
        return dict((await self._send("POST", "/v1/webhooks", json=body)).json())

    async def list_webhooks(self) -> list[Json]:
        """The tenant's webhooks, and how the last delivery to each went."""
        return list((await self._send("GET", "/v1/webhooks")).json()["data"])

    async def delete_webhook(self, webhook_id: str) -> None:
        """Tell it nothing more."""
        await self._send("DELETE", f"/v1/webhooks/{path_part(webhook_id)}")

    async def set_access(self, name: str, tenants: Sequence[str] = (), public: bool = False) -> Json:
        """Say who else may call an adapter, as `tenant/name`; who is left out no longer may."""
        body = {"tenants": list(tenants), "public": public}
        return dict((await self._send("PUT", f"/v1/adapters/{path_part(name)}/access", json=body)).json())

    async def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        await self._send("DELETE", f"/v1/adapters/{path_part(name)}/aliases/{path_part(alias)}")

    async def upload_file(self, path: Path) -> Json:
        """Upload training rows; returns the file's record."""
        with open_rows(path) as file:
            sent = {"file": (path.name, file, "application/octet-stream")}
            response = await self._send("POST", "/v1/files", data={"purpose": "fine-tune"}, files=sent)
        return dict(response.json())

    async def create_job(self, **fields: Any) -> Json:
        """Queue a fine-tuning job; the fields are those of POST /v1/fine_tuning/jobs."""
        return dict((await self._send("POST", "/v1/fine_tuning/jobs", json=fields)).json())

    async def list_jobs(self, limit: int = 20) -> list[Json]:
        """The tenant's newest jobs."""
        return list((await self._send("GET", "/v1/fine_tuning/jobs", params={"limit": limit})).json()["data"])

    async def get_job(self, job_id: str) -> Json:
        """One job."""
        return dict((await self._send("GET", f"/v1/fine_tuning/jobs/{path_part(job_id)}")).json())

    async def list_job_events(self, job_id: str, limit: int = 20) -> list[Json]:
        """What a job said last, newest first."""
        path = f"/v1/fine_tuning/jobs/{path_part(job_id)}/events"
        return list((await self._send("GET", path, params={"limit": limit})).json()["data"])

    async def cancel_job(self, job_id: str) -> Json:
        """Cancel a job; returns it as it stands."""
        return dict((await self._send("POST", f"/v1/fine_tuning/jobs/{path_part(job_id)}/cancel")).json())

    async def create_key(
        self,
        tenant: str | None = None,
        label: str = "",
        role: str = "publisher",
        models: Sequence[str] = (),
        expires_at: str | None = None,
        user: str | None = None,
    ) -> Json:
        """A new key; `secret` is in this answer only. Needs the admin key, or a key of the tenant's role `admin`.

        models: that it may call, none = all; expires_at: ISO 8601 with a zone; user: whose it is.
        """
        body: Json = {"label": label, "role": role}
        for name, value in (("tenant", tenant), ("models", list(models)), ("expires_at", expires_at), ("user", user)):
            if value:
                body[name] = value
        return dict((await self._send("POST", "/v1/keys", json=body)).json())

    async def rotate_key(self, key_id: str, tenant: str | None = None, grace_s: int = 3600) -> Json:
        """A key that may what this one may; this one goes on for `grace_s` seconds."""
        path = f"/v1/keys/{path_part(key_id)}/rotate"
        return dict((await self._send("POST", path, json={"grace_s": grace_s}, params=_whose(tenant))).json())

    async def put_user(self, user: str, role: str, tenant: str | None = None) -> Json:
        """Make a user, or change what its keys may at most."""
        return dict(
            (await self._send("PUT", f"/v1/users/{path_part(user)}", json={"role": role}, params=_whose(tenant))).json()
        )

    async def list_users(self, tenant: str | None = None) -> list[Json]:
        """A tenant's users."""
        return list((await self._send("GET", "/v1/users", params=_whose(tenant))).json()["data"])

    async def delete_user(self, user: str, tenant: str | None = None) -> Json:
        """Remove a user and revoke all its keys."""
        return dict((await self._send("DELETE", f"/v1/users/{path_part(user)}", params=_whose(tenant))).json())

    async def cluster(self) -> Json:
        """Replicas, ranks, queues, residency and scaling decisions. Needs the admin key."""
        return dict((await self._send("GET", "/v1/cluster")).json())

    async def list_keys(self, tenant: str | None = None) -> list[Json]:
        """A tenant's keys; None = the caller's own."""
        return list((await self._send("GET", "/v1/keys", params=_whose(tenant))).json()["data"])

    async def revoke_key(self, tenant: str | None, key_id: str) -> None:
        """Take a key back."""
        await self._send("DELETE", f"/v1/keys/{path_part(key_id)}", params=_whose(tenant))

    async def put_tenant(self, tenant: str, quota: Json, weight: float = 1.0, log_prompts: bool = False) -> Json:
        """Set what a tenant may use, its share of busy engines and whether its prompts are logged. Needs the admin key."""
        body = {"quota": quota, "weight": weight} | ({"log_prompts": True} if log_prompts else {})
        return dict((await self._send("PUT", f"/v1/tenants/{path_part(tenant)}", json=body)).json())

    async def get_tenant(self, tenant: str) -> Json:
        """A tenant's settings: for itself, or with the admin key."""
        return dict((await self._send("GET", f"/v1/tenants/{path_part(tenant)}")).json())

    async def list_tenants(self) -> list[Json]:
        """Every tenant with its settings. Needs the admin key."""
        return list((await self._send("GET", "/v1/tenants")).json()["data"])

    async def audit_log(self, tenant: str | None = None, limit: int = 100, before: str | None = None) -> list[Json]:
        """Who did what, newest first; before: an entry's id."""
        params = {**_whose(tenant), "limit": str(limit)} | ({"before": before} if before else {})
        return list((await self._send("GET", "/v1/audit", params=params)).json()["data"])

    async def usage(self, start: str | None = None, end: str | None = None) -> Json:
        """What the tenant has used, by day (YYYY-MM-DD) and model."""
        return dict((await self._send("GET", "/v1/usage", params=_days(start, end))).json())

    async def usage_csv(self, start: str | None = None, end: str | None = None) -> str:
        """The same for spreadsheets."""
        return (await self._send("GET", "/v1/usage", params={**_days(start, end), "format": "csv"})).text

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **content)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "A name, label or reason holds characters that are not text. Write it anew."
            ) from error
        except httpx.TransportError as error:
            raise Unavailable(f"Cannot reach {self._url}: is the server running, and is this its address?") from error
        if response.is_error:
            raise error_of(response)
        return response

    @asynccontextmanager
    async def _receive(self, path: str) -> AsyncGenerator[httpx.Response]:
        """A response whose body is still to come."""
        try:
            async with self._http.stream("GET", path) as response:
                if response.is_error:
                    await response.aread()
                    raise error_of(response)
                yield response
        except httpx.TransportError as error:
            raise Unavailable(f"The connection to {self._url} broke off. Try again.") from error


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


class _CountedFile(io.FileIO):
    """Tells how much has been read. httpx reads 64 KiB at a time in the event loop: no hardship for a client."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(path)
        self._count = count

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._count(len(data))
        return data


def _whose(tenant: str | None) -> dict[str, str]:
    return {"tenant": tenant} if tenant is not None else {}


def _days(start: str | None, end: str | None) -> dict[str, str]:
    return {name: day for name, day in (("start", start), ("end", end)) if day}
