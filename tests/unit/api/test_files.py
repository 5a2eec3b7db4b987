"""/v1/files, through OpenAI's own client and past it."""

from __future__ import annotations

import httpx
import openai as openai_package
import pytest
from openai import AsyncOpenAI
from support.api_app import ADMIN_KEY, ApiWorld
from support.jobs import job_record

ROWS = b'{"prompt": "1+1=", "completion": "2"}\n'


async def upload(openai: AsyncOpenAI, content: bytes = ROWS, name: str = "train.jsonl") -> str:
    return (await openai.files.create(file=(name, content), purpose="fine-tune")).id


async def test_a_file_goes_in_and_comes_out(openai: AsyncOpenAI, world: ApiWorld) -> None:
    name = "my däta (1).jsonl"
    made = await openai.files.create(file=(name, ROWS), purpose="fine-tune")
    assert made.id.startswith("file-")
    assert (made.filename, made.bytes, made.purpose, made.status) == (name, len(ROWS), "fine-tune", "processed")
    assert await openai.files.retrieve(made.id) == made
    assert (await openai.files.content(made.id)).read() == ROWS
    assert [each async for each in openai.files.list()] == [made]
    assert not list(world.upload_dir.iterdir())
    gone = await openai.files.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "file")
    with pytest.raises(openai_package.NotFoundError):
        await openai.files.retrieve(made.id)


async def test_the_list_pages_filters_and_turns(openai: AsyncOpenAI) -> None:
    ids = [await upload(openai, ROWS * (n + 1)) for n in range(5)]
    assert [file.id async for file in openai.files.list(limit=2)] == ids[::-1]
    assert [file.id async for file in openai.files.list(limit=2, order="asc")] == ids
    page = await openai.files.list(limit=2)
    assert page.has_more
    assert [file async for file in openai.files.list(purpose="batch")] == []
    assert [file.id async for file in openai.files.list(purpose="fine-tune", limit=3)] == ids[::-1]
    with pytest.raises(openai_package.BadRequestError, match="not in this list"):
        await openai.files.list(after="file-" + "0" * 24)


async def test_another_tenants_file_looks_unknown(openai: AsyncOpenAI, world: ApiWorld) -> None:
    theirs = await upload(openai)
    unknown = "file-" + "0" * 24
    async with world.client(await world.key("globex")) as other:
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            answers = [await other.request(method, f"/v1/files/{each}{path}") for each in (theirs, unknown, "nonsense")]
            assert {answer.status_code for answer in answers} == {404}
            assert answers[0].text.replace(theirs, "ID") == answers[1].text.replace(unknown, "ID")
        assert (await other.get("/v1/files")).json()["data"] == []
    assert (await openai.files.retrieve(theirs)).id == theirs


async def test_a_file_in_use_stays(openai: AsyncOpenAI, world: ApiWorld) -> None:
    file_id = await upload(openai)
    await world.jobs.add_job(job_record(await world.jobs.get_file("demo", file_id)))
    with pytest.raises(openai_package.ConflictError, match="in use"):
        await openai.files.delete(file_id)


async def test_deleted_content_is_swept(openai: AsyncOpenAI, world: ApiWorld) -> None:
    first, second = await upload(openai), await upload(openai)
    await openai.files.delete(first)
    assert not await world.store.begin_sweep("demo", 0)
    await openai.files.delete(second)
    assert len(await world.store.begin_sweep("demo", 0)) == 1


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({"purpose": "batch"}, {"file": ("a.jsonl", ROWS)}, "purpose"),
        ({}, {"file": ("a.jsonl", ROWS)}, "purpose"),
        ({"purpose": "fine-tune"}, {"other": ("a.jsonl", ROWS)}, "other"),
        (
            {"purpose": "fine-tune", "expires_after[anchor]": "created_at"},
            {"file": ("a", ROWS)},
            "expires_after[anchor]",
        ),
        ({"purpose": "fine-tune"}, {"file": ("a.jsonl", b"")}, "file"),
        ({"purpose": "fine-tune"}, {"file": ("x" * 300, ROWS)}, "file"),
        ({"purpose": "fine-tune"}, [("file", ("a", ROWS)), ("file", ("b", ROWS))], "file"),
    ],
)
async def test_bad_uploads(
    http: httpx.AsyncClient, world: ApiWorld, data: dict[str, str], files: object, param: str
) -> None:
    answer = await http.post("/v1/files", data=data, files=files)  # type: ignore[arg-type]
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not world.upload_dir.exists() or not list(world.upload_dir.iterdir())
    assert (await http.get("/v1/files")).json()["data"] == []


async def test_a_file_over_the_cap_is_refused(world: ApiWorld) -> None:
    world.rebuild(max_file_bytes=1000)
    async with world.client(await world.key()) as http:
        answer = await http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", b"x" * 2000)})
    assert answer.status_code == 413


async def test_the_admin_acts_for_a_tenant(world: ApiWorld) -> None:
    async with world.client(ADMIN_KEY) as admin:
        assert (await admin.get("/v1/files")).json()["error"]["code"] == "tenant_required"
        assert (await admin.get("/v1/files", headers={"X-Slipstream-Tenant": "acme"})).json()["data"] == []
