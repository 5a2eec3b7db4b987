"""Minutes of load while adapters come and go, replicas are killed and their number changes: nothing may be lost, or grow.

`make soak` runs it for 20 minutes (`SLIPSTREAM_SOAK_MINUTES`); not part of `make test`. What it prints is worth keeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from support.adapters import random_peft_adapter, rename_base
from support.api_app import form_files
from support.load import Load, questions
from support.processes import descendants
from support.ray_cluster import EDGE, Platform, kill, platform
from support.tiny_model import save_tiny_model

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.redis, pytest.mark.timeout(7200)]
MINUTES = float(os.environ.get("SLIPSTREAM_SOAK_MINUTES", "20"))
MODEL = "base"


@dataclass
class Sample:
    """What must not grow."""

    minute: float
    memory_mib: float  # of the gateways, controller and proxy: engines are killed now and then
    files: int
    actors: int
    keys: int
    blocks_lost: int
    slots_lost: int


@dataclass
class Churn:
    """Everything that happens beside the load."""

    world: Platform
    model: Any
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    published: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    replicas: int = 2  # that there are to be

    async def go_on(self, until: float) -> None:
        """One thing after the other."""
        while time.monotonic() < until:
            name = self.rng.choice(["publish", "publish", "delete", "use", "use", "use", "kill", "scale"])
            with contextlib.suppress(httpx.TransportError):
                await asyncio.to_thread(getattr(self, name))
            self.counts[name] = self.counts.get(name, 0) + 1
            await asyncio.sleep(self.rng.uniform(1, 4))

    def publish(self) -> None:
        seed = self.rng.randrange(10**6)
        folder = self.world.folder / f"churn-{seed}"
        random_peft_adapter(self.model, folder, seed=seed)
        rename_base(folder, MODEL)
        name = f"churn-{seed}"
        form = {"name": name, "base": MODEL}
        self.world.admin("/v1/adapters", "POST", tenant="acme", data=form, files=form_files(folder))
        self.published.append(name)

    def delete(self) -> None:
        if self.published:
            name = self.published.pop(self.rng.randrange(len(self.published)))
            self.world.admin(f"/v1/adapters/{name}", "DELETE", tenant="acme")

    def use(self) -> None:
        if self.published:
            body = {"model": self.rng.choice(self.published), "prompt": "x", "max_tokens": 20}
            self.world.admin("/v1/completions", "POST", tenant="acme", json=body)

    def kill(self) -> None:
        replicas = self.world.replicas(MODEL)
        if len(replicas) > 1:
            kill(self.rng.choice(replicas)["ranks"][0]["pid"])

    def scale(self) -> None:
        self.replicas = self.rng.choice([2, 3])
        self.world.run(settings(self.world, self.replicas))


def settings(world: Platform, replicas: int) -> Any:
    model = world.model(MODEL, 32, min_replicas=replicas, adapter_slots=4)
    return world.settings(models=[model], gateway_replicas=2, **EDGE)


def sample(world: Platform, minute: float) -> Sample:
    own = [pid for name in ("ServeController", "Gateway", "ProxyActor") for pid in world.actor_pids(name)]
    replicas = world.replicas(MODEL)
    idle = [replica for replica in replicas if not replica["running"] and not replica["waiting"]]
    with redis.Redis.from_url(world.redis.url, protocol=2) as client:
        keys = client.dbsize()
    return Sample(
        minute,
        sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in own) * 4096 / 2**20,
        sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in own),
        len(world.actor_pids()),
        keys,
        sum(replica["adapter_slots"] - replica["adapter_slots_free"] for replica in idle),
        sum(replica["kv_blocks_total"] - replica["kv_blocks_free"] for replica in idle),
    )


async def test_nothing_is_lost_and_nothing_grows() -> None:
    with platform() as world:
        world.run(settings(world, 2))
        model = save_tiny_model(world.folder / "same", hidden=32)
        world.publish(MODEL, model)
        churn, samples = Churn(world, model), list[Sample]()
        async with world.client() as client:
            load = Load(client, questions([MODEL, *world.adapters]))
            await load.learn()
            churn.publish()
            churn.delete()  # what a tenant keeps for good, such as its versions' numbers, is there now
            before = sample(world, 0)
            began = time.monotonic()
            while time.monotonic() - began < MINUTES * 60:
                async with load.going():
                    await churn.go_on(min(time.monotonic() + 60, began + MINUTES * 60))
                await asyncio.sleep(3)  # nothing is open now
                await asyncio.to_thread(world.wait_for, MODEL, churn.replicas)
                samples.append(await asyncio.to_thread(sample, world, (time.monotonic() - began) / 60))
                print(samples[-1], "answered", load.answered, churn.counts, flush=True)
        for name in list(churn.published):
            churn.published.remove(name)
            world.admin(f"/v1/adapters/{name}", "DELETE", tenant="acme")
        after = sample(world, MINUTES)
        print("at the end", after, "requests that were counted", world.used(), flush=True)
        assert after.keys <= before.keys + 1, "its garbage may be waiting for the sweep"
        assert (load.lost, load.wrong) == ([], [])
        assert load.broken == 0
        assert all(s.blocks_lost == 0 and s.slots_lost == 0 for s in samples)
        assert not leaked(samples), samples
        assert descendants(os.getpid())


def leaked(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Figures whose last quarter is well above their second one (the first warms up)."""
    quarter = max(1, len(samples) // 4)
    grown = {}
    for name, slack in (("memory_mib", 1.15), ("files", 1.15), ("actors", 1.25)):
        early = statistics.median(getattr(s, name) for s in samples[quarter : 2 * quarter] or samples[:1])
        late = statistics.median(getattr(s, name) for s in samples[-quarter:])
        if late > early * slack:
            grown[name] = (early, late)
    return grown
