"""The worst day of a registry: back up while it serves, lose Redis and all adapter files, restore, serve as before."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.processes import free_port
from support.serving import MODEL, Running, serving, slipstream, stop
from support.shared import shared_path

from slipstream.client import SlipstreamClient

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.timeout(600)]
PROMPT = "Extract the intent and the slots of the command as a JSON object.\nCommand: Rate this book 3 stars.\nJSON:"
REFERENCES = (MODEL, "snips", "snips@1", "snips@2", "snips@canary", "sql")


@pytest.fixture
def home() -> Iterator[Path]:
    """Not pytest's own: its paths are long, and sockets must work there."""
    with tempfile.TemporaryDirectory(prefix="slip-e2e-") as folder:
        yield Path(folder) / "home"


def complete(client: httpx.Client, model: str, prompt: str, **more: Any) -> tuple[str, str, int]:
    """Text, what answered, and tokens of the answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, **more}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["text"], answer["model"], answer["usage"]["completion_tokens"]


def answers(running: Running, other_key: str) -> dict[str, tuple[str, str, int]]:
    """Of every adapter, one of them also with a seed, and of a shared one to the tenant that it is shared with."""
    with running.client() as mine:
        found = {reference: complete(mine, reference, PROMPT) for reference in REFERENCES}
        found["sampled"] = complete(mine, "snips", PROMPT, temperature=0.9, seed=7)
    headers = {"Authorization": f"Bearer {other_key}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=60, trust_env=False) as theirs:
        found["shared"] = complete(theirs, "demo/snips", PROMPT)
        assert theirs.get("/v1/adapters/snips").status_code == 404
    return found


def records(running: Running) -> dict[str, Any]:
    """What the API says of the registry, but for what answering changes."""
    with running.client() as client:
        admin = {"Authorization": f"Bearer {running.admin_key}", "X-Slipstream-Tenant": "demo"}
        keys = client.get("/v1/keys", headers=admin).json()["data"]
        return {
            "adapters": client.get("/v1/adapters").json(),
            "moves": client.get("/v1/adapters/snips/aliases").json()["data"],
            "audit": client.get("/v1/audit", headers=admin).json(),
            "tenant": client.get("/v1/tenants/demo", headers=admin).json(),
            "keys": [{name: value for name, value in key.items() if name != "last_used_at"} for key in keys],
        }


async def prepare(running: Running) -> str:
    """Adapters with versions, aliases, a split, sharing and a quota; returns another tenant's key."""
    snips, wikisql = (shared_path("adapters", f"{task}-turbo") for task in ("snips", "wikisql"))
    async with SlipstreamClient(running.url, running.key) as mine:
        await mine.push(snips, "snips", labels={"task": "snips"})
        await mine.push(wikisql, "snips")
        await mine.push(wikisql, "sql")
        await mine.set_alias("snips", "prod", 2)
        await mine.set_alias("snips", "prod", 1)
        await mine.set_alias("snips", "prod", 1, (2, 0.0001), shadow=True)
        await mine.set_alias("snips", "canary", 2)
        await mine.set_access("snips", ["globex"])
    async with SlipstreamClient(running.url, running.admin_key) as admin:
        await admin.put_tenant("demo", {"tokens_per_minute": 10**6}, 2.0)
        key: str = (await admin.create_key("globex"))["secret"]
    return key


def usage(running: Running) -> int:
    with running.client() as client:
        requests: int = client.get("/v1/usage").json()["total"]["requests"]
        return requests


def test_every_adapter_answers_as_before_after_redis_and_blobs_were_lost(home: Path) -> None:
    port, place = free_port(), str(home.parent / "backups")
    with serving(home, port) as first:
        other_key = asyncio.run(prepare(first))
        before, known = answers(first, other_key), records(first)
        used = usage(first)
        done = slipstream(home, port, "registry", "backup", place)
        assert done.returncode == 0, done.stderr
        assert "2 tenants, 2 adapters, 3 versions" in done.stdout
        refused = slipstream(home, port, "registry", "restore", place)
        assert (refused.returncode, "already running" in refused.stderr) == (3, True), refused.stderr
        assert stop(first, signal.SIGINT) == 0
    for folder in ("redis", "blobs", "cache"):
        shutil.rmtree(home / folder)
    done = slipstream(home, port, "registry", "restore", place)
    assert done.returncode == 0, done.stderr
    checked = slipstream(home, port, "registry", "check")
    assert checked.returncode == 0, checked.stdout
    with serving(home, port) as second:
        assert second.key == first.key
        assert usage(second) == used
        assert records(second) == known
        assert answers(second, other_key) == before
        assert stop(second, signal.SIGINT) == 0
