"""Registries with something of everything in them, made at random but the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from support.drafts import draft, entry, sha
from support.jobs import file_record, job_record

from adapter_registry.backup.kinds import Fate, kind_of
from adapter_registry.backup.place import BackupPlace
from adapter_registry.backup.reading import Restore
from adapter_registry.backup.records import Item, Manifest
from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.backup.writing import back_up
from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.errors import InUse, NotPublished
from adapter_registry.imports import IMPORT_PREFIX, ImportFault, ImportRecord
from adapter_registry.jobs import EVENT_PREFIX, JobEvent, JobState, PageQuery, ask_to_cancel, new_id
from adapter_registry.keys import Role, UserRecord, new_key
from adapter_registry.limits import Quota
from adapter_registry.records import (
    Access,
    AdapterVersion,
    Guard,
    Outcome,
    SpeculationPolicy,
    Split,
    VersionState,
    Watch,
    canonical_manifest,
    utc_now,
)
from adapter_registry.redis_imports import RedisImports
from adapter_registry.redis_jobs import ACTIVE_KEY, RedisJobs
from adapter_registry.redis_store import RedisStore
from adapter_registry.redis_tenants import RedisTenants
from adapter_registry.redis_webhooks import RedisWebhooks
from adapter_registry.tenants import Settlement, TenantRecord, UsageCounts
from adapter_registry.webhooks import WEBHOOK_PREFIX, Delivery, WebhookRecord

TENANTS = ("acme", "globex", "jobs")
NAMES = ("sql", "chat", "a.b-c")


@dataclass
class Registry:
    """All of it: every store over one Redis, and the blobs."""

    url: str
    folder: Path
    data: RegistryData
    blobs: ObstoreBlobs
    store: RedisStore
    jobs: RedisJobs
    tenants: RedisTenants
    imports: RedisImports
    webhooks: RedisWebhooks

    async def put(self, tenant: str, *contents: str) -> None:
        """Blobs with these contents, claimed first."""
        await self.store.claim_blobs(tenant, [sha(content) for content in contents])
        for content in contents:
            await self.blobs.put_bytes(tenant, sha(content), content.encode())

    async def publish(self, tenant: str, name: str, content: str) -> AdapterVersion:
        """A version with real content."""
        made = draft(content, tenant=tenant, name=name, attachment=f"card of {content}")
        manifest = canonical_manifest(made.files).decode()
        await self.put(tenant, content, "config", f"card of {content}", manifest)
        version, _ = await self.store.publish(made)
        return version

    async def all_items(self) -> dict[str, Item]:
        """Every key that outlives a backup, but for milliseconds: when one ends, and since when a job is there."""
        found: dict[str, Item] = {}
        for key in await self.data.keys():
            placed = kind_of(key)
            assert placed is not None, key
            if placed.kind.fate is not Fate.PASSING:
                found |= await self.data.read([key])
        for key, item in found.items():
            entries = tuple((member, "") for member in item.members()) if key == ACTIVE_KEY else item.entries
            found[key] = item.model_copy(update={"expires_at_ms": item.expires_at_ms and 1, "entries": entries})
        return found

    async def wipe(self) -> None:
        """Redis and blobs, both."""
        for key in await self.data.keys():
            await self.data.remove(key)
        await self.data.remove("slipstream:schema")
        for tenant in TENANTS:
            for sha256 in [found async for found in self.blobs.list(tenant)]:
                await self.blobs.delete(tenant, sha256)


@asynccontextmanager
async def registry_at(url: str, folder: Path) -> AsyncIterator[Registry]:
    """Connections to it."""
    blobs = ObstoreBlobs.from_url((folder / "registry-blobs").as_uri())
    found = Registry(
        url,
        folder,
        RegistryData.from_url(url),
        blobs,
        RedisStore.from_url(url),
        RedisJobs.from_url(url),
        RedisTenants.from_url(url),
        RedisImports.from_url(url),
        RedisWebhooks.from_url(url),
    )
    try:
        yield found
    finally:
        for each in (found.data, found.store, found.jobs, found.tenants, found.imports, found.webhooks):
            await each.close()


async def fill(registry: Registry, seed: int, steps: int = 60) -> None:
    """Do things to it, at random; what cannot be done is passed over, as a client's mistake would be."""
    chance = random.Random(seed)
    acts: list[Callable[[Registry, random.Random, str], Awaitable[None]]] = [
        _publish, _publish, _publish, _alias, _alias, _delete, _share, _key, _user, _quota, _use, _file, _job, _import,
        _webhook, _policy, _outcome,
    ]  # fmt: skip
    for act in acts:  # something of everything, and then anything
        await _try(act, registry, chance)
    for _ in range(steps):
        await _try(chance.choice(acts), registry, chance)


async def _try(
    act: Callable[[Registry, random.Random, str], Awaitable[None]], registry: Registry, chance: random.Random
) -> None:
    with suppress(NotPublished, InUse):
        await act(registry, chance, chance.choice(TENANTS))


async def _publish(registry: Registry, chance: random.Random, tenant: str) -> None:
    await registry.publish(tenant, chance.choice(NAMES), f"weights {chance.randrange(12)}")


async def _alias(registry: Registry, chance: random.Random, tenant: str) -> None:
    name, (one, other) = chance.choice(NAMES), (chance.randint(1, 3), chance.randint(1, 3))
    split = Split(version=other, weight=0.25, shadow=chance.random() < 0.5) if chance.random() < 0.5 else None
    guard = Guard(max_error_rate=0.1) if chance.random() < 0.5 else None
    await registry.store.set_alias(tenant, name, chance.choice(["prod", "canary"]), one, "key_1", split, guard)
    if chance.random() < 0.2:
        await registry.store.roll_back_alias(tenant, name, "prod", "key_1")


async def _delete(registry: Registry, chance: random.Random, tenant: str) -> None:
    await registry.store.delete(tenant, chance.choice(NAMES), chance.choice([1, 2, 3, 4, None]), "key_1")


async def _share(registry: Registry, chance: random.Random, tenant: str) -> None:
    access = Access(public=chance.random() < 0.5, tenants=tuple(set(chance.choices(TENANTS, k=2))))
    await registry.store.set_access(tenant, chance.choice(NAMES), access)


async def _key(registry: Registry, chance: random.Random, tenant: str) -> None:
    _, key = new_key(tenant, "ci ✓", Role.CALLER, models=("sql",) if chance.random() < 0.5 else None)
    await registry.store.put_key(key)
    await registry.store.note_key_use(tenant, key.id)
    if chance.random() < 0.3:
        await registry.store.delete_key(tenant, key.id)


async def _user(registry: Registry, chance: random.Random, tenant: str) -> None:
    role = chance.choice(list(Role))
    await registry.store.put_user(UserRecord(tenant=tenant, name="ann@example.com", role=role, created_at=utc_now()))
    await registry.store.put_key(new_key(tenant, role=Role.CALLER, user="ann@example.com")[1])


async def _quota(registry: Registry, chance: random.Random, tenant: str) -> None:
    quota = Quota(requests_per_minute=1000, tokens_per_month=chance.randint(10**6, 10**9))
    await registry.tenants.put_tenant(TenantRecord(tenant=tenant, quota=quota, weight=2.5))


async def _use(registry: Registry, chance: random.Random, tenant: str) -> None:
    request = f"r{chance.random()}"
    await registry.tenants.admit(tenant, request, 10)
    counts = UsageCounts(requests=1, prompt_tokens=chance.randrange(100), completion_tokens=7)
    model = chance.choice(["sql@1", "HuggingFaceTB/SmolLM2-135M-Instruct"])
    settled = Settlement(
        request_id=request, tenant=tenant, day=utc_now().date(), model=model, reserved=10, counts=counts
    )
    await registry.tenants.settle(settled)


async def _file(registry: Registry, chance: random.Random, tenant: str) -> None:
    text = f"rows {chance.randrange(5)}"
    await registry.put(tenant, text)
    file = file_record(text, tenant)
    await registry.jobs.add_file(file)
    if chance.random() < 0.3:
        await registry.jobs.delete_file(tenant, file.id)


async def _job(registry: Registry, chance: random.Random, tenant: str) -> None:
    files = (await registry.jobs.list_files(tenant, PageQuery())).items
    if not files:
        return
    job = job_record(chance.choice(files))
    await registry.jobs.add_job(job)
    for line in range(3):
        event = JobEvent(id=new_id(EVENT_PREFIX), created_at=utc_now(), message=f"line {line}")
        await registry.jobs.add_event(tenant, job.id, event)
    end = chance.randrange(3)
    if end == 0:
        await registry.jobs.update_job(tenant, job.id, lambda found: ask_to_cancel(found, utc_now()))
        await registry.jobs.retire(job)
    elif end == 1:
        await registry.jobs.take_slot(job, 100)
        begun = {"attempt": 1, "heartbeat_at": utc_now()}
        await registry.jobs.update_job(tenant, job.id, lambda found: found.moved(JobState.VALIDATING_FILES, **begun))


async def _import(registry: Registry, chance: random.Random, tenant: str) -> None:
    text = f"weights {chance.randrange(12)}"
    record = ImportRecord(
        id=new_id(IMPORT_PREFIX), tenant=tenant, name="sql", files=(entry("a.json", text),), created_at=utc_now()
    )
    await registry.imports.add(record)
    await registry.put(tenant, text)
    await registry.imports.put_part(tenant, record.id, "a.json", 0, sha(text))
    if chance.random() < 0.5:
        fault = ImportFault(code="given_up", message="It was given up.")
        ended = {"state": VersionState.REJECTED, "fault": fault}
        await registry.imports.update(tenant, record.id, lambda found: found.changed(**ended))


async def _webhook(registry: Registry, chance: random.Random, tenant: str) -> None:
    hook = WebhookRecord(
        id=new_id(WEBHOOK_PREFIX),
        tenant=tenant,
        url="https://example.com/",
        secret=SecretStr("whsec_abc"),
        created_at=utc_now(),
    )
    await registry.webhooks.add(hook)
    await registry.webhooks.lease(tenant, "gateway", 60)
    await registry.webhooks.note(tenant, hook.id, Delivery(at=utc_now(), event="1-0", ok=True))
    if chance.random() < 0.3:
        await registry.webhooks.delete(tenant, hook.id)


async def _policy(registry: Registry, chance: random.Random, tenant: str) -> None:
    name = chance.choice(NAMES)
    await registry.store.set_speculation(tenant, name, 1, SpeculationPolicy(enabled=False, reason="slow"))
    await registry.store.set_labels(tenant, name, 1, {"team": "search"})


async def _outcome(registry: Registry, chance: random.Random, tenant: str) -> None:
    watch = Watch(tenant=tenant, name=chance.choice(NAMES), alias="prod")
    await registry.store.note_outcome(watch, chance.randint(1, 3), Outcome(requests=1), f"told {chance.random()}")


async def save(registry: Registry, place: BackupPlace) -> Manifest:
    """Back it up."""
    return await back_up(registry.data, registry.blobs, place)


async def bring_back(registry: Registry, place: BackupPlace, **options: Any) -> Manifest:
    """Restore it."""
    return await Restore(registry.data, registry.blobs, place).run(**options)
