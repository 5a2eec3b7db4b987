"""Two tenants on one engine: every answer is by the asker's own weights, whatever is published, moved, shared and evicted
beside it.

Each adapter's answer to a prompt names its owner, by its text and its log-probabilities: they were learnt from PEFT, with the
adapter alone. `make soak` asks 50,000 times (`SLIPSTREAM_ISOLATION_REQUESTS`), CI a few hundred.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.adapters import TINY_ID, random_peft_adapter, random_streams, write_own_streams
from support.api_app import ApiWorld, form_files
from support.tiny_model import save_tiny_model, tiny_tokenizer

from deployments.adapter_source import BlobAdapterSource
from slipstream.engine.config import EngineConfig
from slipstream.engine.service import EngineService

pytestmark = pytest.mark.timeout(7200)
REQUESTS = int(os.environ.get("SLIPSTREAM_ISOLATION_REQUESTS", "300"))
TENANTS = ("acme", "globex")
NAMES = ("sql", "mail", "code")
PROMPTS = ("tell me", "tell me who", "tell me who you are and whose")  # they share their beginning, and so blocks
TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """A text and the log-probability of each of its tokens."""

    text: str
    logprobs: tuple[float, ...]

    def same(self, other: Answer) -> bool:
        """Whether both are by the same weights."""
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return self.text == other.text and all(abs(a - b) < 2e-3 for a, b in pairs)


@dataclass
class World:
    """The application over a real engine, and what each version of each adapter answers."""

    api: ApiWorld
    clients: dict[str, httpx.AsyncClient]
    folders: dict[tuple[str, str, int], Path]
    answers: dict[tuple[str, str, int], tuple[Answer, ...]]  # (tenant, name, version) → by prompt
    shared: bool = False
    current: dict[tuple[str, str], int] = field(default_factory=dict)


def alone(model: Any, prompt: str) -> Answer:
    """Greedy, by transformers."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        scores = model(ids).logits[0, -TOKENS - 1 : -1].log_softmax(-1)
    chosen = ids[0, -TOKENS:]
    return Answer(
        tokenizer.decode(chosen, skip_special_tokens=True), tuple(scores.gather(1, chosen.unsqueeze(1))[:, 0].tolist())
    )


@asynccontextmanager
async def two_tenants(folder: Path) -> AsyncIterator[World]:
    """Three adapters each, of the same names, in two versions; both have one of the same content."""
    base = save_tiny_model(folder / "base")
    api = ApiWorld(folder / "uploads")
    config = EngineConfig(
        model_path=str(folder / "base"), model_id=TINY_ID, dtype="float32", device="cpu", num_threads=1,
        kv_cache_bytes=1 << 19, adapter_slots=2, host_adapter_bytes=200_000,
    )  # fmt: skip
    engine = EngineService(config, BlobAdapterSource(api.blobs, folder / "cache", 1 << 20))
    await engine.start()
    api.rebuild(engines={TINY_ID: engine})
    world = World(api, {tenant: api.client(await api.key(tenant)) for tenant in TENANTS}, {}, {})
    for i, key in enumerate((t, n, v) for t in TENANTS for n in NAMES for v in (1, 2)):
        tenant, name, version = key
        seed = 7 if (name, version) == ("code", 1) else 100 + i
        path = folder / f"{tenant}-{name}-{version}"
        oracle = random_peft_adapter(
            base, path, seed=seed, r=8, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"]
        )
        write_own_streams(path, random_streams(base.config.hidden_size, 3, rank=4, seed=seed))
        world.folders[key] = path
        world.answers[key] = tuple(alone(oracle, prompt) for prompt in PROMPTS)
    try:
        for tenant, name in ((t, n) for t in TENANTS for n in NAMES):
            await publish(world, tenant, name, 1)
            await publish(world, tenant, name, 2)
        yield world
    finally:
        for client in world.clients.values():
            await client.aclose()
        await engine.close()


async def publish(world: World, tenant: str, name: str, version: int) -> None:
    form = {"name": name, "base": TINY_ID}
    files = form_files(world.folders[tenant, name, version])
    response = await world.clients[tenant].post("/v1/adapters", data=form, files=files)
    assert response.status_code in (200, 201), response.text
    assert response.json()["version"] == version
    world.current.setdefault((tenant, name), version)
    await point(world, tenant, name, world.current[tenant, name])


async def point(world: World, tenant: str, name: str, version: int) -> None:
    response = await world.clients[tenant].put(f"/v1/adapters/{name}/aliases/prod", json={"version": version})
    assert response.status_code == 200, response.text
    world.current[tenant, name] = version


async def ask(world: World, tenant: str, rng: random.Random) -> str | None:
    """One request; what is wrong with its answer."""
    name, which = rng.choice(NAMES), rng.randrange(len(PROMPTS))
    form = rng.choice(["plain", "version", "full", "others"])
    owner = tenant
    if form == "others":
        owner = next(other for other in TENANTS if other != tenant)
    version = rng.choice((1, 2))
    model = {"plain": name, "version": f"{name}@{version}", "full": f"{owner}/{name}@{version}"}.get(form)
    body = {
        "model": model or f"{owner}/{name}@{version}", "prompt": PROMPTS[which], "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True, "logprobs": 0, "speculation": rng.choice([True, False, "auto"]),
    }  # fmt: skip
    response = await world.clients[tenant].post("/v1/completions", json=body)
    if form == "others" and not (name == "mail" and world.shared):
        return None if response.status_code == 404 else f"{tenant} got {body['model']}: {response.text}"
    if response.status_code != 200:
        return f"{tenant} asked for {body['model']}: {response.text}"
    answer = response.json()
    if form == "plain":
        version = int(answer["model"].rpartition("@")[2])  # where the alias was when it was asked
    choice = answer["choices"][0]
    got, wanted = (
        Answer(choice["text"], tuple(choice["logprobs"]["token_logprobs"])),
        world.answers[owner, name, version][which],
    )
    return None if got.same(wanted) else f"{tenant} asked {body['model']} and got {got}, not {wanted}"


async def test_no_tenant_ever_gets_anothers_answer(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as world:
        answers = [answer for key, each in world.answers.items() for answer in each if key != ("globex", "code", 1)]
        assert not any(a.same(b) for a, b in itertools.combinations(answers, 2)), "each answer tells whose it is"
        wrong: list[str] = []
        left = iter(range(REQUESTS))
        stop = asyncio.Event()

        async def client(seed: int) -> None:
            rng = random.Random(seed)
            for _ in left:
                trouble = await ask(world, TENANTS[seed % 2], rng)
                if trouble is not None:
                    wrong.append(trouble)

        async def churn() -> None:
            rng = random.Random(0)
            while not stop.is_set():
                tenant, name = rng.choice(TENANTS), rng.choice(NAMES)
                await point(world, tenant, name, rng.choice((1, 2)))
                await asyncio.sleep(0.02)

        await world.clients["acme"].put("/v1/adapters/mail/access", json={"tenants": ["globex"]})
        await world.clients["globex"].put("/v1/adapters/mail/access", json={"public": True})
        world.shared = True
        moving = asyncio.create_task(churn())
        await asyncio.gather(*(client(seed) for seed in range(12)))
        stop.set()
        await moving
        assert wrong == []
        assert next(left, None) is None


async def test_blocks_of_a_prompt_are_not_shared_between_tenants(tmp_path: Path) -> None:
    """Or how fast a first token comes would tell one tenant what another has asked."""
    async with two_tenants(tmp_path) as world:
        prompt = "a long prompt that two tenants happen to send, " * 3

        async def cached(tenant: str, model: str) -> int:
            body = {"model": model, "prompt": prompt, "max_tokens": 1}
            usage = (await world.clients[tenant].post("/v1/completions", json=body)).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        await world.clients["acme"].put("/v1/adapters/mail/access", json={"public": True})
        for model, others in ((TINY_ID, TINY_ID), ("code@1", "code@1"), ("mail@1", "acme/mail@1")):
            assert await cached("acme", model) == 0
            assert await cached("acme", model) > 0
            assert await cached("globex", others) == 0
