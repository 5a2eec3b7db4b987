"""The HTTP application over fakes, and small adapters that fit the fake base model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from safetensors.numpy import save_file

from adapter_registry.keys import hash_key, new_key
from adapter_registry.records import AdapterDraft, AdapterKind, AdapterVersion, FileEntry, PromptFormat, Route
from deployments.remote_sources import RemoteSources
from slipstream.api import ApiServices, create_app
from slipstream.importing.sources import Sources
from slipstream.metrics.engine import EngineMetrics
from slipstream.testing import (
    FAKE_BASE,
    FakeCluster,
    FakeEngine,
    FakePeers,
    ManualClock,
    MemoryBlobs,
    MemoryImports,
    MemoryJobs,
    MemoryStore,
    MemoryTenants,
    MemoryWebhooks,
    ScriptedJobRunner,
)

ADMIN_KEY = "admin-key-of-the-tests"
BASE = FAKE_BASE.id


class FlakyStore(MemoryStore):
    """A store whose next calls fail with `outage`."""

    outage: Exception | None = None

    async def find_key(self, sha256: str) -> Any:
        """As the store, unless it is away."""
        self._fail()
        return await super().find_key(sha256)

    async def route(self, tenant: str, selector: Any, point: float | None = None) -> Route:
        """As the store, unless it is away."""
        self._fail()
        return await super().route(tenant, selector, point)

    async def list(self, tenant: str) -> Any:
        """As the store, unless it is away."""
        self._fail()
        return await super().list(tenant)

    async def tenants(self) -> Any:
        """As the store, unless it is away."""
        self._fail()
        return await super().tenants()

    async def ping(self) -> None:
        """As the store, unless it is away."""
        self._fail()

    def _fail(self) -> None:
        if self.outage is not None:
            raise self.outage


@dataclass
class ApiWorld:
    """One application and everything behind it."""

    upload_dir: Path
    engine_metrics: EngineMetrics = field(default_factory=EngineMetrics)
    engine: FakeEngine = field(default_factory=FakeEngine)
    store: FlakyStore = field(default_factory=FlakyStore)
    blobs: MemoryBlobs = field(default_factory=MemoryBlobs)
    jobs: MemoryJobs = field(init=False)
    tenants: MemoryTenants = field(init=False)
    imports: MemoryImports = field(init=False)
    webhooks: MemoryWebhooks = field(init=False)
    sources: Sources = field(default_factory=lambda: RemoteSources(("hf://",)))
    runner: ScriptedJobRunner = field(default_factory=ScriptedJobRunner)
    cluster: FakeCluster = field(default_factory=FakeCluster)
    clock: ManualClock = field(default_factory=ManualClock)
    overrides: dict[str, Any] = field(default_factory=dict)
    app: FastAPI = field(init=False)

    def __post_init__(self) -> None:
        self.engine.observer = self.engine_metrics
        self.jobs = MemoryJobs(self.store)
        self.tenants = MemoryTenants(self.store, clock=self.clock)
        self.imports = MemoryImports(self.store)
        self.webhooks = MemoryWebhooks(self.store)
        self.rebuild()

    def rebuild(self, **overrides: Any) -> None:
        """Build the application anew, with other limits."""
        self.overrides |= overrides
        services = ApiServices(
            engines={BASE: self.engine},
            store=self.store,
            blobs=self.blobs,
            jobs=self.jobs,
            tenants=self.tenants,
            imports=self.imports,
            webhooks=self.webhooks,
            sources=self.sources,
            job_runner=self.runner,
            cluster=self.cluster,
            peers=FakePeers({BASE: self.engine}, {BASE: self.engine_metrics}),
            admin_key_sha256=hash_key(ADMIN_KEY),
            upload_dir=self.upload_dir,
            clock=self.clock,
        )
        self.app = create_app(replace(services, **self.overrides))

    async def key(self, tenant: str = "demo") -> str:
        """A new key of a tenant."""
        secret, record = new_key(tenant)
        await self.store.put_key(record)
        return secret

    def client(self, key: str | None, **headers: str) -> httpx.AsyncClient:
        """An HTTP client of the application, in this process."""
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        # Errors must have become responses: an exception that leaves the application fails the test.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    async def publish(
        self, name: str, tenant: str = "demo", prompt_format: PromptFormat = PromptFormat.CHAT, content: str = "a"
    ) -> AdapterVersion:
        """A version in the store, without any files behind it."""
        sha = hash_key(content)
        draft = AdapterDraft(
            tenant=tenant,
            name=name,
            kind=AdapterKind.LORA,
            base_model=BASE,
            base_digest=FAKE_BASE.base_digest,
            rank=4,
            prompt_format=prompt_format,
            files=(FileEntry(path="adapter_config.json", size=1, sha256=sha),),
        )
        await self.store.claim_blobs(tenant, draft.blob_sha256s)
        return (await self.store.publish(draft))[0]


def write_adapter(folder: Path, *, rank: int = 2, base: str = BASE, nan: bool = False, seed: int = 0) -> Path:
    """A PEFT LoRA for one layer of the fake base model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    noise = np.random.default_rng(seed)
    down = noise.standard_normal((rank, 8), dtype=np.float32)
    up = noise.standard_normal((8, rank), dtype=np.float32)
    if nan:
        down[0, 0] = np.nan
    save_file({f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def form_files(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """A folder's files, as httpx sends them."""
    return [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
