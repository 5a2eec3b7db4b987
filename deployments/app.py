"""Settings in, a Serve application out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from adapter_registry.keys import hash_key
from deployments.engine_replica import REAL_ENGINE, EngineReplica, ReplicaPlan, on_its_cores
from deployments.gateway import Gateway, GatewayPlan
from deployments.training_jobs import TrainingPlan
from slipstream.base_models import served_id
from slipstream.config import ModelSettings, Settings, load_settings
from slipstream.errors import ConfigError

APP_NAME = "slipstream"
_GATEWAY_ONGOING = 4096  # the gateway only waits; what is bounded is the engine's queue
_HEALTH_PERIOD_S = 2.0
_DRAIN_S = 60.0  # a stopping replica finishes what it runs, up to this


class AppArgs(BaseModel):
    """`args` in a Serve config file. What is not given comes from `SLIPSTREAM_*` variables, secrets always do."""

    model_config = ConfigDict(extra="forbid")

    home: Path | None = None
    blob_url: str | None = None
    base_model: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    device: str | None = None
    engine_replicas: int | None = None
    engine_cpus: float | None = None
    engine_gpus: float | None = None
    gateway_replicas: int | None = None
    max_upload_bytes: int | None = None
    training_cpus: float | None = None
    training_gpus: float | None = None
    max_training_jobs: int | None = None
    models: list[dict[str, Any]] | None = None


def build(args: AppArgs) -> Application:
    """The builder that a Serve config file names: `import_path: deployments.app:build`."""
    settings = load_settings(**args.model_dump(exclude_none=True))
    if settings.redis_url is None or settings.admin_key is None:
        raise ConfigError(
            "On a cluster SLIPSTREAM_REDIS_URL and SLIPSTREAM_ADMIN_KEY must be set: "
            "replicas share one registry and one admin key."
        )
    return build_application(settings.model_copy(update={"models": tuple(map(on_its_cores, settings.models))}))


def build_application(settings: Settings, *, engine: str = REAL_ENGINE, drain_s: float = _DRAIN_S) -> Application:
    """Gateway and engines, wired. `settings` has Redis and the admin key resolved."""
    assert settings.redis_url is not None
    assert settings.admin_key is not None
    blob_url = settings.blob_url or f"file://{settings.home / 'blobs'}"
    engines: dict[str, Application] = {}
    for model in settings.models:
        model_id = model.id or served_id(model.base_model)
        engines[model_id] = _engine(ReplicaPlan(model, model_id, settings.home, blob_url, engine), drain_s)
    plan = GatewayPlan(
        redis_url=settings.redis_url,
        blob_url=blob_url,
        admin_key_sha256=hash_key(settings.admin_key.get_secret_value()),
        upload_dir=settings.home / "uploads",
        max_upload_bytes=settings.max_upload_bytes,
        training=_training(settings, blob_url),
        max_training_jobs=settings.max_training_jobs,
    )
    deployment = serve.deployment(
        name="Gateway",
        num_replicas=settings.gateway_replicas,
        max_ongoing_requests=_GATEWAY_ONGOING,
        ray_actor_options={"num_cpus": settings.gateway_cpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
    )(serve.ingress()(Gateway))
    return deployment.bind(plan, engines)


def _training(settings: Settings, blob_url: str) -> TrainingPlan:
    assert settings.redis_url is not None
    return TrainingPlan(
        redis_url=settings.redis_url,
        blob_url=blob_url,
        home=settings.home,
        base_models={model.id or served_id(model.base_model): model.base_model for model in settings.models},
        adapter_cache_bytes=settings.adapter_cache_bytes,
        cpus=settings.training_cpus,
        gpus=settings.training_gpus,
    )


def deployment_name(model: ModelSettings) -> str:
    """The engine deployment's name in Serve."""
    return f"EngineReplica-{model.slug}"


def _engine(plan: ReplicaPlan, drain_s: float) -> Application:
    model = plan.model
    # More than the engine itself takes: a full queue is then refused by the engine, at once and with a reason, rather
    # than waiting unseen in a router.
    ongoing = 2 * (model.max_num_seqs + model.max_waiting)
    deployment = serve.deployment(
        name=deployment_name(model),
        num_replicas=model.engine_replicas,
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        ray_actor_options={"num_cpus": model.engine_cpus, "num_gpus": model.engine_gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
    )(EngineReplica)
    return deployment.bind(plan)
