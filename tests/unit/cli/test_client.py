"""The registry client: references, progress, and errors turned back into the tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_app import ApiWorld, write_adapter

from slipstream import errors as tree
from slipstream.client import SlipstreamClient, to_reference


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sql", "sql"),
        ("sql/3", "sql@3"),
        ("sql@3", "sql@3"),
        ("acme/sql", "acme/sql"),
        ("acme/sql@3", "acme/sql@3"),
        ("sql/0", "sql/0"),
        ("a/b/3", "a/b/3"),
    ],
)
def test_references(text: str, reference: str) -> None:
    assert to_reference(text) == reference


async def test_progress_counts_every_byte(tmp_path: Path) -> None:
    world = ApiWorld(tmp_path / "uploads")
    folder = write_adapter(tmp_path / "lora")
    (folder / "curve.png").write_bytes(b"x" * 300_000)
    seen: list[tuple[int, int]] = []
    transport = httpx.ASGITransport(world.app)
    async with SlipstreamClient("http://test", await world.key(), transport=transport) as client:
        version, is_new = await client.push(folder, "sql", lambda sent, total: seen.append((sent, total)))
        assert is_new
        assert version["ref"] == "sql@1"
        await client.set_alias("sql", "prod", 1)
        assert (await client.get_adapter("sql"))["aliases"] == {"prod": 1}
        await client.delete_alias("sql", "prod")
        assert (await client.delete_adapter("sql", 1))["versions"] == [1]
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in folder.iterdir())
    assert [sent for sent, _ in seen] == sorted(sent for sent, _ in seen)
    assert len(seen) > 3


def answering(status: int, body: Any = None, **headers: str) -> SlipstreamClient:
    """A client of a server that answers everything alike."""
    content = {"text": body} if isinstance(body, str) else {"json": body}
    transport = httpx.MockTransport(lambda request: httpx.Response(status, headers=headers, **content))
    return SlipstreamClient("http://test", "key", transport=transport)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, tree.InvalidRequest),
        (401, tree.Unauthorized),
        (403, tree.Forbidden),
        (404, tree.NotFound),
        (409, tree.Conflict),
        (413, tree.PayloadTooLarge),
        (429, tree.Overloaded),
        (500, tree.ServerError),
        (503, tree.Unavailable),
    ],
)
async def test_errors_come_back_as_the_tree(status: int, kind: type[tree.SlipstreamError]) -> None:
    body = {"error": {"message": "Because.", "type": "t", "param": "p", "code": "c"}}
    with pytest.raises(kind, match=r"Because\.") as caught:
        await answering(status, body, **{"retry-after": "7", "x-request-id": "r-1"}).list_adapters()
    error = caught.value
    assert type(error) is kind
    if isinstance(error, tree.Overloaded):
        assert error.retry_after_s == 7
    else:
        assert error.code == "c"
    assert ("r-1" in str(error)) == (status >= 500)


@pytest.mark.parametrize("body", ["<html>", "[]", {"error": "text"}, {"detail": 1}])
async def test_a_proxys_page_is_an_error_too(body: Any) -> None:
    with pytest.raises(tree.Unavailable, match="502"):
        await answering(502, body).list_adapters()


@pytest.mark.parametrize("url", ["http://test", "http://test/", "http://test/v1", "http://test/v1/"])
async def test_the_address_may_be_openais(url: str) -> None:
    asked: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"data": []})

    async with SlipstreamClient(url, "key", transport=httpx.MockTransport(note)) as client:
        await client.list_adapters()
    assert asked == ["http://test/v1/adapters"]


async def test_names_stay_one_path_segment() -> None:
    asked: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path.decode())
        return httpx.Response(200, json={})

    async with SlipstreamClient("http://test", "key", transport=httpx.MockTransport(note)) as client:
        for name in ("a/b", "..", "a?b", "a b"):
            await client.get_adapter(name)
    assert asked == ["/v1/adapters/a%2Fb", "/v1/adapters/%2E%2E", "/v1/adapters/a%3Fb", "/v1/adapters/a%20b"]
