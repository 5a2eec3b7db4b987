"""`Slipstream`: data sets, training, adapters and prompts in one synchronous object, in the shape that users of other
fine-tuning services know. For asynchronous code there are `SlipstreamClient` and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from adapter_registry.errors import InvalidName
from adapter_registry.records import check_name
from slipstream.client.connect import TIMEOUT, checked_url, open_rows, path_part, visible
from slipstream.client.failures import error_of
from slipstream.client.references import to_reference
from slipstream.client.sdk_progress import TrainingDisplay
from slipstream.client.sdk_types import (
    Dataset,
    FinetunedAdapter,
    FinetuningConfig,
    FinetuningFailed,
    GeneratedText,
    Repo,
    StreamedText,
)
from slipstream.client.slipstream_client import SlipstreamClient
from slipstream.config import client_settings
from slipstream.errors import Conflict, InvalidRequest, NotFound, Unavailable

Json = dict[str, Any]
_JOBS = "/v1/fine_tuning/jobs"
_ENDED = ("succeeded", "failed", "cancelled")
_PAGE = 100
_PATIENCE_S = 120.0  # how long `wait` lets a server be away


class Slipstream:
    """One tenant's view of a server. `url` and `api_key` default to SLIPSTREAM_URL and SLIPSTREAM_API_KEY.

    Errors are those of `slipstream.errors`.
    """

    def __init__(
        self,
        api_key: str | None = None,
        url: str | None = None,
        *,
        poll_s: float = 1.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        default_url, default_key = client_settings()
        self._url, self._key = checked_url(url or default_url), api_key or default_key
        if not self._key:
            raise InvalidRequest("No key: set SLIPSTREAM_API_KEY or give api_key.", param="api_key")
        headers = {"Authorization": f"Bearer {visible(self._key, 'API key')}"}
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=TIMEOUT, transport=transport)
        self.datasets = Datasets(self)
        self.repos = Repos(self)
        self.adapters = Adapters(self, poll_s)
        self.deployments = Deployments(self)

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def __enter__(self) -> Slipstream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """One request; an answer of 400 or more becomes the error it stands for."""
        try:
            response = self._http.request(method, path, **content)
        except httpx.TransportError as error:
            raise self._unreachable() from error
        if response.is_error:
            raise error_of(response)
        return response

    def lines(self, path: str, body: Json) -> Iterator[Json]:
        """The events of a streamed answer."""
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _event(line.removeprefix("data: "), response)
        except httpx.TransportError as error:
            raise self._unreachable() from error

    def download(self, reference: str, folder: Path) -> None:
        """All files of a version. In a thread with a loop of its own: the caller may live in one, as notebooks do."""

        async def work() -> None:
            async with SlipstreamClient(self._url, self._key) as client:
                await client.fetch_files(reference, folder)

        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, work()).result()

    def _unreachable(self) -> Unavailable:
        return Unavailable(f"Cannot reach {self._url}: is the server running, and is this its address?")


class Datasets:
    """Uploaded training files."""

    def __init__(self, client: Slipstream) -> None:
        self._client = client

    def from_file(self, path: str | Path, name: str | None = None) -> Dataset:
        """Upload a .jsonl or .csv file. `name` is what it is called there; by default its own name."""
        path = Path(path)
        name = name if name is None or Path(name).suffix else name + path.suffix
        with open_rows(path) as file:
            sent = self._client.send(
                "POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": (name or path.name, file)}
            )
        return _dataset(sent.json())

    def get(self, name_or_id: str) -> Dataset:
        """By id, or the newest one of this name. Raises `NotFound`."""
        if name_or_id.startswith("file-"):
            return _dataset(self._client.send("GET", f"/v1/files/{path_part(name_or_id)}").json())
        for dataset in self.list():
            if name_or_id in (dataset.name, Path(dataset.name).stem):
                return dataset
        raise NotFound(f"There is no data set {name_or_id!r}. Upload one: datasets.from_file(path).")

    def list(self) -> list[Dataset]:
        """All of them, newest first."""
        return [_dataset(each) for each in self._client.send("GET", "/v1/files").json()["data"]]

    def delete(self, dataset: Dataset) -> None:
        """Remove one. Raises `Conflict` while a training job uses it."""
        self._client.send("DELETE", f"/v1/files/{path_part(dataset.id)}")


class Repos:
    """A repository is nothing but an adapter's name: its versions are what was trained or pushed under it."""

    def __init__(self, client: Slipstream) -> None:
        self._client = client

    def create(self, name: str, description: str | None = None, *, exists_ok: bool = False) -> Repo:
        """Check a name. The server keeps nothing before the first version, so `description` stays with this object.

        Raises `InvalidRequest` for a name that adapters cannot have, and `Conflict` when there are versions under it,
        unless `exists_ok`.
        """
        try:
            check_name(name)
        except InvalidName as error:
            raise InvalidRequest(str(error), param="name") from error
        try:
            found = self.get(name)
        except NotFound:
            return Repo(name, description or "")
        if not exists_ok:
            raise Conflict(f"{name!r} has versions already. Say exists_ok=True to add to them.")
        return Repo(name, description or "", found.versions)

    def get(self, name: str) -> Repo:
        """Raises `NotFound` when nothing is published under the name."""
        found = self._client.send("GET", f"/v1/adapters/{path_part(name)}").json()
        return Repo(name, versions=tuple(version["version"] for version in found["versions"]))


class Adapters:
    """Training, and what came of it."""

    def __init__(self, client: Slipstream, poll_s: float) -> None:
        self._client = client
        self._poll_s = poll_s

    def create(
        self,
        config: FinetuningConfig,
        dataset: Dataset | str,
        repo: Repo | str,
        description: str | None = None,
        *,
        validation: Dataset | str | None = None,
        continue_from_version: str | None = None,
        show_progress: bool = True,
    ) -> FinetunedAdapter:
        """Train, show the metrics as they come, and return the published version.

        `continue_from_version` ("repo/1") names the adapter that `adapter="turbo"` makes faster. Interrupting (Ctrl-C)
        leaves the job running on the server. Raises `FinetuningFailed` with the job's own reason.
        """
        job = self.start(
            config, dataset, repo, description, validation=validation, continue_from_version=continue_from_version
        )
        return self.wait(job, show_progress=show_progress)

    def start(
        self,
        config: FinetuningConfig,
        dataset: Dataset | str,
        repo: Repo | str,
        description: str | None = None,
        *,
        validation: Dataset | str | None = None,
        continue_from_version: str | None = None,
    ) -> str:
        """As `create`, without waiting: the job's id."""
        body: Json = {
            "model": config.base_model,
            "training_file": self._file_id(dataset),
            "suffix": repo if isinstance(repo, str) else repo.name,
            "slipstream": config.options_body(),
        }
        if continue_from_version is not None:
            body["slipstream"]["adapter"] = to_reference(continue_from_version)
        if validation is not None:
            body["validation_file"] = self._file_id(validation)
        if config.seed is not None:
            body["seed"] = config.seed
        if description:
            body["metadata"] = {"description": description[:512]}
        return str(self._client.send("POST", _JOBS, json=body).json()["id"])

    def wait(self, job_id: str, *, show_progress: bool = True) -> FinetunedAdapter:
        """Follow a job to its end, through restarts of the gateway. Raises `FinetuningFailed`, and `Unavailable` when the
        server stays away."""
        seen: set[str] = set()
        heard = time.monotonic()
        with TrainingDisplay(show_progress) as display:
            while True:
                try:
                    job = self._client.send("GET", f"{_JOBS}/{path_part(job_id)}").json()
                    for event in _new_events(self._client, job_id, seen):
                        display.event(event)
                except Unavailable:  # a gateway that restarts: the job goes on meanwhile
                    if time.monotonic() - heard > _PATIENCE_S:
                        raise
                    time.sleep(self._poll_s)
                    continue
                heard = time.monotonic()
                display.job(job)
                if job["status"] in _ENDED:
                    break
                time.sleep(self._poll_s)
        if job["status"] != "succeeded":
            error = job["error"] or {"code": "cancelled", "message": f"The job {job_id} was cancelled.", "param": None}
            raise FinetuningFailed(error["message"], code=error["code"], job=job)
        return self.get(job["fine_tuned_model"])

    def get(self, reference: str) -> FinetunedAdapter:
        """A version: "repo/1", "repo@1", "repo@alias", or "repo" for the current one. Raises `NotFound`."""
        name, _, tag = to_reference(reference).partition("@")
        found = self._client.send("GET", f"/v1/adapters/{path_part(name)}").json()
        number = found["current"] if not tag else int(tag) if tag.isdigit() else found["aliases"].get(tag)
        version = next((each for each in found["versions"] if each["version"] == number), None)
        if version is None:
            raise NotFound(f"There is no version {tag or 'yet'} of {name!r}.")
        return FinetunedAdapter.of(version)

    def list(self, repo: str | Repo) -> list[FinetunedAdapter]:
        """All versions of a repository, newest first."""
        name = repo if isinstance(repo, str) else repo.name
        found = self._client.send("GET", f"/v1/adapters/{path_part(name)}").json()
        return [FinetunedAdapter.of(version) for version in found["versions"]]

    def download(self, reference: str, dest: str | Path) -> Path:
        """Fetch a version's files, with its card and curves, into a folder; returns the folder."""
        self._client.download(to_reference(reference), Path(dest))
        return Path(dest)

    def delete(self, reference: str) -> None:
        """Remove one version. Raises `NotFound`, and `Conflict` while an alias points at it."""
        version = self.get(reference)
        self._client.send("DELETE", f"/v1/adapters/{path_part(version.repo)}/versions/{version.tag}")

    def _file_id(self, dataset: Dataset | str) -> str:
        return dataset.id if isinstance(dataset, Dataset) else self._client.datasets.get(dataset).id


class Deployments:
    """Where prompts go."""

    def __init__(self, client: Slipstream) -> None:
        self._client = client

    def client(self, base_model: str) -> Deployment:
        """The base model's deployment; every adapter on it is reached through the same one."""
        return Deployment(self._client, base_model)


class Deployment:
    """One base model and the adapters on it."""

    def __init__(self, client: Slipstream, base_model: str) -> None:
        self._client = client
        self._base_model = base_model

    def generate(self, prompt: str, adapter_id: str | None = None, **parameters: Any) -> GeneratedText:
        """The answer to one prompt. `adapter_id` is "repo/1", "repo@1" or "repo"; without it the base model answers.

        `parameters`: `max_new_tokens`, `temperature`, `apply_chat_template` (needed for adapters whose prompt format is
        chat), and any other field of /v1/completions, such as `seed`, `stop` or `speculation`.
        """
        path, body = self._request(prompt, adapter_id, parameters)
        return GeneratedText.of(self._client.send("POST", path, json=body).json())

    def generate_stream(self, prompt: str, adapter_id: str | None = None, **parameters: Any) -> Iterator[StreamedText]:
        """As `generate`, piece by piece; the last piece carries the whole as `generated_text`."""
        path, body = self._request(prompt, adapter_id, parameters)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        whole, reason, usage = "", None, None
        for event in self._client.lines(path, body):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                reason = choice["finish_reason"] or reason
                whole += text
                if text:
                    yield StreamedText(text)
        yield StreamedText("", GeneratedText.from_parts(whole, reason, usage))

    def _request(self, prompt: str, adapter_id: str | None, parameters: Json) -> tuple[str, Json]:
        fields = dict(parameters)
        chat = fields.pop("apply_chat_template", False)
        model = to_reference(adapter_id) if adapter_id else self._base_model
        body: Json = {"model": model, **fields}
        if "max_new_tokens" in body:
            body["max_tokens"] = body.pop("max_new_tokens")
        if chat:
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
        return "/v1/completions", {**body, "prompt": prompt}


def _new_events(client: Slipstream, job_id: str, seen: set[str]) -> list[Json]:
    """The events that were not seen before, oldest first."""
    fresh: list[Json] = []
    after: Json = {}
    while True:
        path = f"{_JOBS}/{path_part(job_id)}/events"
        page = client.send("GET", path, params={"limit": _PAGE, **after}).json()
        new = [event for event in page["data"] if event["id"] not in seen]
        fresh += new
        if not page["has_more"] or len(new) < len(page["data"]):
            break
        after = {"after": page["last_id"]}
    seen.update(event["id"] for event in fresh)
    return fresh[::-1]


def _dataset(body: Json) -> Dataset:
    return Dataset(body["id"], body["filename"], body["bytes"])


def _event(data: str, response: httpx.Response) -> Json:
    event = dict(json.loads(data))
    if "error" in event:  # the status was sent before it was known
        raise error_of(httpx.Response(503, json=event, headers=response.headers))
    return event
