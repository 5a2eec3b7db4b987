"""The Serve deployment that answers HTTP: `slipstream.api` with its parts plugged in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.redis_imports import RedisImports
from adapter_registry.redis_jobs import RedisJobs
from adapter_registry.redis_store import RedisStore
from adapter_registry.redis_tenants import RedisTenants
from adapter_registry.redis_webhooks import RedisWebhooks
from deployments.cluster import RayCluster
from deployments.engine_client import RayEngineClient
from deployments.metrics_peers import RayPeers
from deployments.remote_sources import RemoteSources
from deployments.serve_states import ServedModel
from deployments.telemetry import TelemetryPlan, begin_telemetry
from deployments.training_jobs import RayJobRunner, TrainingPlan
from slipstream.api.app import create_app
from slipstream.api.runtime import Runtime
from slipstream.api.scrape import own_page
from slipstream.api.services import ApiServices
from slipstream.metrics.pages import Page

APP_NAME = "slipstream"  # in Serve, where we name it


@dataclass(frozen=True, slots=True)
class GatewayPlan:
    """What a gateway is built from: plain data, so that it travels to any node."""

    redis_url: SecretStr
    blob_url: str
    admin_key_sha256: str
    upload_dir: Path
    max_upload_bytes: int
    training: TrainingPlan
    models: Mapping[str, ServedModel]
    max_training_jobs: int = 1
    pull_sources: tuple[str, ...] = ()
    webhook_private_hosts: tuple[str, ...] = ()
    metrics_key_sha256: str | None = None
    telemetry: TelemetryPlan = field(default_factory=TelemetryPlan)


class Gateway:
    """Holds no state of its own. Connections are made here, in the replica, never pickled into it."""

    def __init__(self, plan: GatewayPlan, engines: Mapping[str, DeploymentHandle]) -> None:
        self._plan = plan
        self._engines = engines

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this in the replica's own event loop, after the constructor."""
        plan, redis_url = self._plan, self._plan.redis_url.get_secret_value()
        store, jobs, tenants = (
            RedisStore.from_url(redis_url),
            RedisJobs.from_url(redis_url),
            RedisTenants.from_url(redis_url),
        )
        imports, webhooks = RedisImports.from_url(redis_url), RedisWebhooks.from_url(redis_url)
        connections = (store, jobs, tenants, imports, webhooks)
        context = serve.get_replica_context()
        app = context.app_name  # not always ours: `serve run` calls it "default"
        tracing = begin_telemetry(plan.telemetry, "gateway", context.replica_id.unique_id)
        engines = {
            id_: RayEngineClient(handle, app, plan.models[id_], tracing) for id_, handle in self._engines.items()
        }
        services = ApiServices(
            engines=engines,
            cluster=RayCluster(app, plan.models, engines),
            peers=RayPeers(plan.models, self._engines),
            store=store,
            blobs=ObstoreBlobs.from_url(plan.blob_url),
            jobs=jobs,
            tenants=tenants,
            imports=imports,
            webhooks=webhooks,
            webhook_private_hosts=plan.webhook_private_hosts,
            sources=RemoteSources(plan.pull_sources, plan.blob_url),
            job_runner=RayJobRunner(plan.training),
            admin_key_sha256=plan.admin_key_sha256,
            upload_dir=plan.upload_dir,
            max_upload_bytes=plan.max_upload_bytes,
            max_running_jobs=plan.max_training_jobs,
            metrics_key_sha256=plan.metrics_key_sha256,
            registry_failures=lambda: sum(each.failures for each in connections),
            tracing=tracing,
        )
        app = create_app(services)
        self._runtime: Runtime = app.state.runtime
        return app

    async def metrics(self) -> Page:
        """What this gateway counts, for the one that is scraped."""
        return await own_page(self._runtime)
