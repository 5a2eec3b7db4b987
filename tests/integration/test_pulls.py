"""Adapters fetched from where somebody else keeps them: a bucket and a model hub, each over real HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from support.api_app import write_adapter
from support.http_server import serving_app
from support.s3_server import BUCKET, put_object, running_s3

from deployments.remote_sources import RemoteSources
from slipstream.errors import AdapterRejected, InvalidRequest, Unavailable

COMMIT = "1f" * 20
MAX = 1 << 20


@pytest.fixture(scope="module")
def s3() -> Iterator[Mapping[str, str]]:
    with running_s3() as environment:
        yield environment


@pytest.fixture
def bucket(s3: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in write_adapter(tmp_path / "lora").iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_from_a_bucket(bucket: Mapping[str, str], here: Path, lora: dict[str, bytes]) -> None:
    for name, data in lora.items():
        put_object(bucket, f"team/sql/{name}", data)
    put_object(bucket, "team/sql/checkpoint-1/optimizer.pt", b"deeper down")
    put_object(bucket, "team/sql-other/adapter_config.json", b"a neighbour")
    sources, seen = RemoteSources((f"s3://{BUCKET}/team/",)), list[int]()
    url = f"s3://{BUCKET}/team/sql"
    assert await sources.fetch(url, here, MAX, seen.append) == url
    assert contents(here) == lora
    assert seen[-1] == sum(map(len, lora.values()))


async def test_a_bucket_that_has_too_much_or_nothing(bucket: Mapping[str, str], here: Path) -> None:
    sources = RemoteSources((f"s3://{BUCKET}/",))
    put_object(bucket, "big/a.safetensors", b"x" * 2000)
    put_object(bucket, "odd/with space.json", b"{}")
    for i in range(70):
        put_object(bucket, f"many/{i}.json", b"{}")
    for folder, code in (("big", "adapter_too_large"), ("many", "adapter_too_large"), ("odd", "bad_file_name")):
        with pytest.raises(AdapterRejected) as refused:
            await sources.fetch(f"s3://{BUCKET}/{folder}", here, 1000, lambda _: None)
        assert refused.value.code == code
    with pytest.raises(InvalidRequest) as missing:
        await sources.fetch(f"s3://{BUCKET}/nothing", here, 1000, lambda _: None)
    assert missing.value.code == "source_not_found"
    assert contents(here) == {}


async def test_a_bucket_that_does_not_answer(
    bucket: Mapping[str, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("deployments.remote_sources._RETRY_S", 1.0)
    with pytest.raises(Unavailable):
        await RemoteSources(("s3://",)).fetch(f"s3://{BUCKET}/x", here, 1000, lambda _: None)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("s3://models/team/sql", True),
        ("s3://models/team", True),
        ("s3://models/teamsters/sql", False),
        ("s3://models/team/../others/sql", False),
        ("s3://models/team/./registry/x", False),
        ("s3://models/team//registry/x", False),
        ("s3://models/team/%2e%2e/others", False),
        ("s3://models/team/%72egistry/x", False),
        ("s3://models:99/team/sql", False),
        ("s3://models/team/sql?versionId=1", False),
        ("s3://key@models/team/sql", False),
        ("s3://whole/anything", True),
        ("s3://whole-of-others/anything", False),
        ("hf://org/a..b", True),
        ("s3://models", False),
        ("s3://models/team/registry/acme/blobs", False),
        ("s3://models/team/registry", False),
        ("file:///etc", False),
        ("http://169.254.169.254/latest", False),
        ("memory://", False),
        ("hf://org/name@main", True),
        ("hf://org/name/../../x", False),
        ("hf://name", False),
        ("hf://other/name", False),
    ],
)
def test_only_what_the_operator_named_may_be_pulled(url: str, allowed: bool) -> None:
    sources = RemoteSources(("s3://models/team/", "hf://org/", "s3://whole"), blob_url="s3://models/team/registry")
    if allowed:
        sources.check(url)
        return
    with pytest.raises(InvalidRequest):
        sources.check(url)


def hub_of(files: Mapping[str, bytes]) -> FastAPI:
    """The two routes of a model hub that a download needs."""
    app = FastAPI()

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    def info(owner: str, name: str, revision: str = "main") -> Response:
        if f"{owner}/{name}" != "org/sql" or revision not in ("main", COMMIT):
            return Response(status_code=404, headers={"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        return JSONResponse({"id": "org/sql", "modelId": "org/sql", "sha": COMMIT, "siblings": siblings})

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path}", methods=["GET", "HEAD"])
    def resolve(owner: str, name: str, revision: str, path: str) -> Response:
        headers = {"X-Repo-Commit": revision, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
        return Response(files[path], headers=headers, media_type="application/octet-stream")

    return app


async def test_from_the_hub(here: Path, lora: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the operator's own")
    more = {".gitattributes": b"x", "runs/log.txt": b"x"}
    with serving_app(hub_of(lora | more)) as url:
        sources, seen = RemoteSources(("hf://",), hub=url), list[int]()
        assert await sources.fetch("hf://org/sql", here, MAX, seen.append) == f"hf://org/sql@{COMMIT}"
        assert contents(here) == lora
        assert seen[-1] == sum(map(len, lora.values()))
        with pytest.raises(AdapterRejected):
            await sources.fetch("hf://org/sql@main", here, 10, seen.append)
        with pytest.raises(InvalidRequest):
            await sources.fetch("hf://org/a--b", here, MAX, seen.append)
        with pytest.raises(InvalidRequest) as missing:
            await sources.fetch("hf://org/other", here, MAX, seen.append)
        assert missing.value.code == "source_not_found"
    with pytest.raises(Unavailable):
        await sources.fetch("hf://org/sql", here, MAX, seen.append)
