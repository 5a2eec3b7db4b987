"""A client that leaves: over real sockets, the engine lets go of its request and an upload leaves nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import uvicorn
from support.api_app import BASE, ApiWorld


@asynccontextmanager
async def serving(world: ApiWorld) -> AsyncIterator[int]:
    """The application under uvicorn on a free loopback port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(world.app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = True
        await task


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> ApiWorld:
    world = ApiWorld(tmp_path / "uploads")
    world.engine.step_delay_s = 0.02
    world.engine.enqueue("word " * 200, "word " * 200, "word " * 200, "word " * 200)
    return world


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def post(path: str, key: str, body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {key}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_cancels_the_request(world: ApiWorld, stream: bool, n: int) -> None:
    key = await world.key()
    async with serving(world) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = {"model": BASE, "prompt": "x", "max_tokens": 150, "stream": stream, "n": n}
        writer.write(post("/v1/completions", key, json.dumps(body).encode()))
        await writer.drain()
        if stream:
            await reader.readuntil(b"data: ")
        await until(lambda: len(world.engine.running) == 1)
        writer.close()
        await writer.wait_closed()
        await until(lambda: world.engine.running == set())
    assert world.engine.cancelled == [world.engine.requests[0].request_id]


async def test_leaving_cancels_every_prompt(world: ApiWorld) -> None:
    key = await world.key()
    async with serving(world) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        body = {"model": BASE, "prompt": ["x", "y", "z"], "max_tokens": 150}
        writer.write(post("/v1/completions", key, json.dumps(body).encode()))
        await until(lambda: len(world.engine.running) == 3)
        writer.close()
        await until(lambda: world.engine.running == set())
    assert len(world.engine.cancelled) == 3


async def test_leaving_before_the_first_token_cancels(world: ApiWorld) -> None:
    world.engine.step_delay_s = 60
    key = await world.key()
    async with serving(world) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        body = {"model": BASE, "prompt": "x", "stream": True}
        writer.write(post("/v1/completions", key, json.dumps(body).encode()))
        await until(lambda: len(world.engine.running) == 1)
        writer.close()
        await until(lambda: world.engine.running == set())


async def test_a_client_that_stays_is_not_cancelled(world: ApiWorld) -> None:
    world.engine.step_delay_s = 0.0
    key = await world.key()
    async with serving(world) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"model": BASE, "prompt": "x", "max_tokens": 5}).encode()
        for _ in range(2):  # on one connection
            writer.write(post("/v1/completions", key, body))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()
    assert world.engine.cancelled == []


async def test_leaving_mid_upload_leaves_nothing(world: ApiWorld) -> None:
    key = await world.key()
    part = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.safetensors"\r\n\r\n' + b"x" * 3_000_000
    async with serving(world) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/adapters", key, part, "multipart/form-data; boundary=B", length=50_000_000))
        await writer.drain()
        files = world.upload_dir.glob
        await until(lambda: any(path.stat().st_size > 1_000_000 for path in files("*/*")))
        writer.close()
        await until(lambda: not list(world.upload_dir.iterdir()))
    assert world.blobs.content == {}


async def test_an_announced_giant_is_answered_at_once(world: ApiWorld) -> None:
    key = await world.key()
    async with serving(world) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/adapters", key, b"--B", "multipart/form-data; boundary=B", length=10 * 10**9))
        async with asyncio.timeout(3):
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        writer.close()
