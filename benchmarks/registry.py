"""What the registry costs: a request's way through it, and thousands of adapters of a hundred tenants; a real Redis server.

A request resolves its key (every few seconds), its model, and is admitted against its tenant's quota; it is settled later,
beside others. Publishing is timed without its blobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated

import typer

from adapter_registry.errors import NotPublished
from adapter_registry.keys import KeyRecord, new_key
from adapter_registry.limits import Quota
from adapter_registry.records import AdapterDraft, AdapterKind, FileEntry, parse_reference, utc_now
from adapter_registry.redis_store import RedisStore
from adapter_registry.redis_tenants import RedisTenants
from adapter_registry.tenants import Settlement, TenantRecord, UsageCounts
from benchmarks.report import table

WARM_UP = 200


def draft(tenant: str, name: str, number: int) -> AdapterDraft:
    """A version as real ones are: two files, a manifest, a card."""

    def entry(path: str) -> FileEntry:
        sha = hashlib.sha256(f"{tenant}/{name}/{number}/{path}".encode()).hexdigest()
        return FileEntry(path=path, size=10_000_000, sha256=sha)

    return AdapterDraft(
        tenant=tenant, name=name, kind=AdapterKind.TURBO_LORA, base_model="base", base_digest="sha256:" + "0" * 64, rank=16,
        num_streams=3, acceptance=(0.9, 0.8, 0.7),
        files=tuple(map(entry, ("adapter_config.json", "adapter_model.safetensors", "turbo_streams.safetensors"))),
        attachments=(entry("training_card.md"),),
    )  # fmt: skip


async def timed(count: int, work: Callable[[int], Awaitable[object]], at_once: int = 1) -> list[float]:
    """Milliseconds of each of `count` calls, so many at a time."""
    times: list[float] = []
    numbers = iter(range(count))

    async def one() -> None:
        for i in numbers:
            began = time.perf_counter()
            await work(i)
            times.append(1000 * (time.perf_counter() - began))

    await asyncio.gather(*(one() for _ in range(at_once)))
    return times


def line(name: str, times: list[float]) -> list[str]:
    """p50, p99 and the most, in ms."""
    ordered = sorted(times)
    return [name, f"{statistics.median(ordered):.2f}", f"{ordered[int(0.99 * len(ordered))]:.2f}", f"{ordered[-1]:.1f}"]


async def fill(
    store: RedisStore, quotas: RedisTenants, names: list[str], each: int
) -> tuple[list[KeyRecord], list[float]]:
    """Quotas, a key and adapters for every tenant; returns the keys, and ms of each publish."""
    for name in names:
        limits = Quota(requests_per_minute=10**9, tokens_per_minute=10**12, concurrent_requests=10**6)
        await quotas.put_tenant(TenantRecord(tenant=name, quota=limits))
    keys = [new_key(name)[1] for name in names]
    for key in keys:
        await store.put_key(key)
    empty = await memory(store)

    async def publish(i: int) -> None:
        version = draft(names[i % len(names)], f"adapter-{i // len(names)}", i)
        await store.claim_blobs(version.tenant, version.blob_sha256s)
        await store.publish(version)

    published = await timed(len(names) * each, publish)
    print(f"Redis memory: {(await memory(store) - empty) / len(published):.0f} bytes an adapter.\n")
    return keys, published


async def measure(url: str, tenants: int, each: int, requests: int) -> None:
    """Fill the registry, then ask it."""
    store, quotas = RedisStore.from_url(url), RedisTenants.from_url(url)
    rng = random.Random(0)
    names = [f"tenant-{i}" for i in range(tenants)]
    print(f"{tenants} tenants, {each} adapters each; one client process, Redis on the same machine.")
    keys, published = await fill(store, quotas, names, each)

    async def resolve(_: int) -> None:
        reference = f"adapter-{rng.randrange(each)}"
        await store.resolve(rng.choice(names), parse_reference(reference))

    async def admit(i: int) -> None:
        await quotas.admit(rng.choice(names), f"a{i}", 100)

    async def settle(i: int) -> None:
        counts = UsageCounts(requests=1, prompt_tokens=50, completion_tokens=50)
        await quotas.settle(
            Settlement(
                request_id=f"s{i}",
                tenant=rng.choice(names),
                day=utc_now().date(),
                model="sql@1",
                reserved=100,
                counts=counts,
            )
        )

    async def way(i: int) -> None:
        key = await store.find_key(rng.choice(keys).sha256)
        assert key is not None
        await store.resolve(key.tenant, parse_reference(f"adapter-{rng.randrange(each)}"))
        await quotas.admit(key.tenant, f"w{i}", 100)

    await timed(WARM_UP, way)
    rows = [
        line("key, model and quota: a request's whole way", await timed(requests, way)),
        line("the same, 16 at once", await timed(requests, lambda i: way(i + requests), 16)),
        line("resolve", await timed(requests, resolve)),
        line("admit", await timed(requests, admit)),
        line("settle", await timed(requests, settle)),
        line(f"list {each} adapters of a tenant", await timed(50, lambda i: store.list(names[i % tenants]))),
        line("publish (claim and publish)", published),
        *await guesses(store, names, each, requests),
    ]
    print(table(["ms", "p50", "p99", "most"], rows))
    await store.close()
    await quotas.close()


async def guesses(store: RedisStore, names: list[str], each: int, count: int) -> list[list[str]]:
    """Another tenant's adapter that is there and not shared, and one that is not there, in turns: whoever guesses names must
    not see from the time which it was."""
    times: dict[str, list[float]] = {"forbidden": [], "unknown": []}
    for i in range(count):
        for kind, name in (("forbidden", f"adapter-{i % each}"), ("unknown", f"nothing-{i % each}")):
            selector = parse_reference(f"{names[i % len(names)]}/{name}")
            began = time.perf_counter()
            with suppress(NotPublished):
                await store.resolve("somebody-else", selector)
            times[kind].append(1000 * (time.perf_counter() - began))
    slices = range(0, count, max(1, count // 10))
    ratios = [
        statistics.median(times["forbidden"][i : i + count // 10])
        / statistics.median(times["unknown"][i : i + count // 10])
        for i in slices
    ]
    print(
        f"Forbidden / unknown: {statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f} over ten slices)\n"
    )
    return [line(f"resolve what is {kind}", found) for kind, found in times.items()]


async def memory(store: RedisStore) -> int:
    """Bytes that Redis holds."""
    return int((await store._command("INFO", "memory"))["used_memory"])


def main(
    url: Annotated[str, typer.Option(help="An empty Redis: redis://…; it is filled and not emptied.")],
    tenants: Annotated[int, typer.Option(help="Tenants.")] = 100,
    each: Annotated[int, typer.Option(help="Adapters of each.")] = 100,
    requests: Annotated[int, typer.Option(help="Calls of each kind.")] = 5000,
) -> None:
    """Cost of a request's way through the registry, and of 10,000 adapters in it."""
    asyncio.run(measure(url, tenants, each, requests))
