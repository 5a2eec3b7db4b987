"""What registry and replicas do together, on the running application: parts, smoke prompts, rollouts, webhooks, changes."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook
from support.processes import eventually
from support.serving import MODEL, Running
from support.shared import shared_path

from slipstream.client import SlipstreamClient, resumable
from slipstream.errors import AdapterRejected

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.timeout(600)]
PROMPT = "Extract the intent and the slots of the command as a JSON object.\nCommand: Rate this book 3 stars.\nJSON:"
SMOKE = [{"prompt": PROMPT, "expect": "RateBook", "max_tokens": 32}]


@pytest.fixture
def deliveries() -> Iterator[tuple[str, list[tuple[bytes, dict[str, str]]]]]:
    """A receiver of webhooks on this machine: its address, and what came."""
    came: list[tuple[bytes, dict[str, str]]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append((self.rfile.read(int(self.headers["Content-Length"])), dict(self.headers.items())))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hooks", came
    server.shutdown()
    server.server_close()
    thread.join(10)


def on_replicas(server: Running) -> dict[str, str]:
    """digest → where it is, on the one replica."""
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    page = httpx.get(f"{server.url}/v1/cluster", headers=headers, trust_env=False, timeout=30).json()
    [model] = [model for model in page["models"] if model["model"] == MODEL]
    return {digest: state for replica in model["replicas"] for digest, state in replica["adapters"].items()}


def copy_of(adapter: str, folder: Path) -> Path:
    """Of a content that no other test publishes: what others still name stays on replicas."""
    shutil.copytree(shared_path("adapters", adapter), folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7))
    return folder


async def push(server: Running, folder: Path, **wishes: Any) -> dict[str, Any]:
    """In parts, whatever its size."""
    async with SlipstreamClient(server.url, server.key) as client:
        version, _ = await resumable.push_in_parts(client, folder, "roll", **wishes)
    return version


def test_a_rollout_from_upload_to_rollback(
    server: Running, deliveries: tuple[str, list[tuple[bytes, dict[str, str]]]], tmp_path: Path
) -> None:
    address, came = deliveries
    headers = {"Authorization": f"Bearer {server.admin_key}", "X-Slipstream-Tenant": "demo"}
    with server.client() as http, httpx.Client(base_url=server.url, headers=headers, trust_env=False) as admin:
        secret = admin.post("/v1/webhooks", json={"url": address}).json()["secret"]
        snips, wikisql = (copy_of(f"{task}-turbo", tmp_path / task) for task in ("snips", "wikisql"))
        first = asyncio.run(push(server, snips, smoke=SMOKE, labels={"task": "snips"}))
        assert first["ref"] == "roll@1"
        assert on_replicas(server).get(first["digest"]) is not None, "its smoke prompt ran there"
        with pytest.raises(AdapterRejected) as refused:
            asyncio.run(push(server, wikisql, smoke=SMOKE))
        assert refused.value.code == "smoke_test"
        second = asyncio.run(push(server, wikisql))
        assert second["ref"] == "roll@2"

        def put(**body: Any) -> None:
            assert http.put("/v1/adapters/roll/aliases/prod", json=body).status_code == 200

        def ask() -> dict[str, Any]:
            answer = http.post(
                "/v1/completions", json={"model": "roll", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
            )
            found: dict[str, Any] = answer.json()
            return found

        put(version=1)
        assert ask()["model"] == "roll@1"
        put(version=1, split={"version": 2, "weight": 0.9999, "shadow": True})
        for _ in range(3):
            assert ask()["model"] == "roll@1"

        def compared() -> int:
            rows = http.get("/v1/adapters/roll/aliases").json()["outcomes"]
            return sum(row["compared"] for row in rows if row["version"] == 2)

        assert eventually(lambda: compared() == 3, 30)
        put(version=1)
        plain = copy_of("snips-turbo", tmp_path / "plain")  # the first one's LoRA, without its speculator
        for name in ("config.json", "medusa_lm_head.safetensors"):
            (plain / name).unlink()
        third = asyncio.run(push(server, plain))
        assert third["ref"] == "roll@3"
        put(version=2, guard={"max_error_rate": 0.5, "min_acceptance": 0.99, "min_requests": 2})
        models = [ask()["model"] for _ in range(4)]  # it drafts far worse than that
        assert models[0] == "roll@2"
        assert eventually(lambda: http.get("/v1/adapters/roll").json()["aliases"] == {"prod": 1}, 30)
        assert ask()["model"] == "roll@1"
        assert http.get("/v1/adapters/roll/aliases").json()["data"][0]["by"] == "guard"
        assert third["digest"] not in on_replicas(server)
        put(version=3)  # it is fetched before anybody asks for it
        assert eventually(lambda: third["digest"] in on_replicas(server), 30)
        assert http.delete("/v1/adapters/roll").status_code == 200
        assert eventually(lambda: not {first["digest"], second["digest"]} & set(on_replicas(server)), 30)

    def types() -> list[str]:
        return [json.loads(body)["type"] for body, _ in came]

    assert eventually(lambda: "version.deleted" in types(), 30)
    for body, sent in came:
        Webhook(secret).verify(body, sent)
    assert types()[:3] == ["version.published", "version.published", "alias.moved"]
