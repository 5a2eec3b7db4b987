"""One application per test, and a client of the tenant `demo`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from support.api_app import ADMIN_KEY, ApiWorld


@pytest.fixture
def world(tmp_path: Path) -> ApiWorld:
    """The application and its fakes."""
    return ApiWorld(tmp_path / "uploads")


@pytest_asyncio.fixture
async def http(world: ApiWorld) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key of `demo`."""
    async with world.client(await world.key()) as client:
        yield client


@pytest_asyncio.fixture
async def admin(world: ApiWorld) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the admin key and no tenant."""
    async with world.client(ADMIN_KEY) as client:
        yield client


@pytest_asyncio.fixture
async def openai(world: ApiWorld) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client, with a key of `demo`."""
    inner = world.client(None)
    async with AsyncOpenAI(
        api_key=await world.key(),
        base_url="http://test/v1",
        http_client=inner,  # type: ignore[arg-type]
        max_retries=0,
    ) as client:
        yield client
