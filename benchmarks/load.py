"""The client of the HTTP benchmarks. It shares its server's cores: what it costs, the engine does not get."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import aiohttp


@dataclass(frozen=True)
class Completion:
    """What is asked: a greedy answer of exactly `tokens`."""

    model: str
    prompt: str | Sequence[int]
    tokens: int
    speculation: bool = False
    stream: bool = False

    def body(self) -> dict[str, Any]:
        """In OpenAI's words, and ours."""
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        return {
            "model": self.model, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True,
            "speculation": self.speculation, **streamed,
        }  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """One request's figures: seconds from its start to its first and to its last event; without a stream, to the answer."""

    tokens: int
    first_s: float
    last_s: float


class Refused(Exception):
    """An error instead of an answer, or in the middle of one."""


class LoadClient:
    """aiohttp, as `vllm bench serve` does it. Of a stream only the last event is parsed: OpenAI's SDK makes objects of all of
    them, which costs the cores more than the gateway does."""

    def __init__(self, url: str, key: str) -> None:
        self._session = aiohttp.ClientSession(
            url, headers={"authorization": f"Bearer {key}"}, timeout=aiohttp.ClientTimeout(total=600),
            connector=aiohttp.TCPConnector(limit=0),
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        await self._session.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def first_model(self) -> str:
        """The id of the base model."""
        async with self._session.get("/v1/models", raise_for_status=True) as response:
            return str((await response.json())["data"][0]["id"])

    async def ask(self, completion: Completion) -> Answered:
        """One completion. Raises `Refused`."""
        began = time.perf_counter()
        async with self._session.post("/v1/completions", json=completion.body()) as response:
            if response.status != 200:
                raise Refused(f"{response.status}: {await response.text()}")
            if not completion.stream:
                usage = (await response.json())["usage"]
                took = time.perf_counter() - began
                return Answered(usage["completion_tokens"], took, took)
            first = last = 0.0
            events = [b""] * 3  # the last ones: … usage, [DONE], and the empty rest
            async for chunk in response.content.iter_any():
                last = time.perf_counter() - began
                first = first or last
                events = [*events[:-1], *(events[-1] + chunk).split(b"\n\n")][-3:]
        if events[1] != b"data: [DONE]":
            raise Refused(b" ".join(events).decode())
        return Answered(json.loads(events[0].removeprefix(b"data: "))["usage"]["completion_tokens"], first, last)
