"""What the HTTP side is given: everything it talks to and every limit it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapter_registry.imports import ImportStore
from adapter_registry.jobs import JobStore
from adapter_registry.store import BlobStore, Store
from adapter_registry.tenants import TenantStore
from adapter_registry.webhooks import WebhookStore
from slipstream.cluster.view import ClusterClient
from slipstream.importing.sources import Sources
from slipstream.metrics.pages import MetricsPeers
from slipstream.protocol import EngineClient
from slipstream.training.jobs import JobRunner

if TYPE_CHECKING:
    from slipstream.telemetry.tracing import Tracing

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ApiServices:
    """The parts behind the routes. Whoever builds them owns and closes them."""

    engines: Mapping[str, EngineClient]  # base model id -> its engine
    store: Store
    blobs: BlobStore
    jobs: JobStore
    tenants: TenantStore
    imports: ImportStore
    sources: Sources
    webhooks: WebhookStore
    job_runner: JobRunner
    cluster: ClusterClient
    peers: MetricsPeers
    admin_key_sha256: str  # hex, as `adapter_registry.keys.hash_key` makes it
    upload_dir: Path  # on the disk that has room for uploads; made when missing
    max_upload_bytes: int = 4096 * MIB  # the whole multipart body
    max_file_bytes: int = 512 * MIB  # the same, of a data file
    max_body_bytes: int = 8 * MIB  # every other body
    max_running_jobs: int = 1  # fine-tuning jobs at once, of all tenants; more wait
    max_waiting_jobs: int = 100  # jobs of one tenant that have not ended; more are answered 429
    jobs_every_s: float = 1.0  # between two rounds over the jobs
    imports_every_s: float = 1.0  # between two rounds over the imports
    webhooks_every_s: float = 1.0  # between two rounds of deliveries
    webhook_private_hosts: tuple[str, ...] = ()  # that webhooks may name beside public ones
    job_stale_s: float = 60.0  # a job that is silent for so long has lost its worker
    request_timeout_s: float = 600.0  # from arrival to the last token
    probe_timeout_s: float = 2.0  # /readyz and /metrics wait no longer than this for a part
    key_cache_s: float = 5.0  # how long a revoked key may still work at another gateway
    outage_cache_s: float = 300.0  # how long known keys and names go on working while the registry is away
    sweep_every_s: float = 600.0  # between two looks for blobs that nothing refers to
    sweep_grace_s: float = 3600.0  # how long such a blob is kept: longer than any upload takes
    metrics_key_sha256: str | None = (
        None  # of a key that shows the metrics that name tenants and adapters, and nothing else
    )
    registry_failures: Callable[[], int] = lambda: 0  # commands that the registry did not answer, so far
    clock: Callable[[], float] = time.monotonic
    tracing: Tracing | None = None  # None = off
