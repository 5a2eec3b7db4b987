"""Settings in, a Serve application out; and the Serve config file that says the same.

Annotations are evaluated here, unlike elsewhere: Serve looks at the class of `build`'s argument, and would hand over a bare
dictionary if it found a name.
"""

import warnings
from pathlib import Path
from typing import Any, Optional

import yaml
from pydantic import ConfigDict, Field, create_model
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from adapter_registry.keys import hash_key
from deployments.embedded_redis import check_redis_url
from deployments.engine_replica import EngineReplica
from deployments.gateway import APP_NAME, Gateway, GatewayPlan
from deployments.replica_plan import REAL_ENGINE, ReplicaPlan, on_its_cores
from deployments.serve_states import ServedModel
from deployments.telemetry import serve_logging, telemetry_plan
from deployments.training_jobs import TrainingPlan
from slipstream.base_models import served_id
from slipstream.config import ModelSettings, Settings, load_settings
from slipstream.errors import ConfigError

_GATEWAY_ONGOING = 4096  # the gateway only waits; what is bounded is the engine's queue
_GATEWAY_TARGET = 256  # open requests that ask for one more gateway, where their number may change
_HEALTH_PERIOD_S = 2.0
_KUBERNETES_PORT = 8000
_REPORT_S = 1.0  # between two reports of a replica to routers and autoscaler
_NOT_ARGS = {
    "host",
    "port",
    "admin_key",
    "metrics_key",
    "redis_url",
    "demo_adapters",
}  # Serve's own, secrets, and what only a laptop has

_FIELDS: dict[str, Any] = {
    name: (Optional[field.annotation], Field(None, description=field.description))  # noqa: UP045 - it is no type's name
    for name, field in Settings.model_fields.items()
    if name not in _NOT_ARGS | {"models"}
}
_Given: Any = create_model("_Given", __config__=ConfigDict(extra="forbid"), **_FIELDS)


class AppArgs(_Given):
    """`args` in a Serve config file. What is not given comes from `SLIPSTREAM_*` variables, secrets always do."""

    models: list[dict[str, Any]] | None = None


def build(args: AppArgs) -> Application:
    """The builder that a Serve config file names: `import_path: deployments.app:build`."""
    settings = load_settings(**args.model_dump(exclude_none=True))
    if settings.redis_url is None or settings.admin_key is None:
        raise ConfigError(
            "On a cluster SLIPSTREAM_REDIS_URL and SLIPSTREAM_ADMIN_KEY must be set: "
            "replicas share one registry and one admin key."
        )
    check_redis_url(settings.redis_url)
    return build_application(settings.model_copy(update={"models": tuple(map(on_its_cores, settings.models))}))


def serve_config(settings: Settings) -> str:
    """A Serve config file (YAML) for `serve run` and KubeRay that starts what `slipstream serve` would start; secrets come
    from the environment. Threads are written out: on a cluster they follow `engine_cpus` otherwise."""
    left_out = _NOT_ARGS | set(ModelSettings.model_fields)  # flat model settings: every model has them already
    args = settings.model_dump(mode="json", exclude=left_out, exclude_none=True)
    args["models"] = [model.model_dump(mode="json", exclude_none=True) for model in settings.models]
    return yaml.safe_dump(_page(settings, args), sort_keys=False)


def rayservice_patch(settings: Settings, name: str) -> str:
    """The part of a KubeRay `RayService` named `name` that follows from the settings, as a kustomize patch (YAML).

    Only what was set is written: everything else is a default of the version that runs in the pods.
    """
    if settings.port != _KUBERNETES_PORT:
        raise ConfigError(f"port is {settings.port}; the manifests' ports, policies and routes say {_KUBERNETES_PORT}.")
    args = settings.model_dump(mode="json", exclude=_NOT_ARGS, exclude_unset=True)
    if "models" in args:
        args = {key: value for key, value in args.items() if key not in ModelSettings.model_fields}
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {"serveConfigV2": _Block(yaml.safe_dump(_page(settings, args), sort_keys=False))},
    }
    return yaml.dump(patch, Dumper=_BlockDumper, sort_keys=False)


def _page(settings: Settings, args: dict[str, Any]) -> dict[str, Any]:
    """A Serve config with our one application."""
    application = {"name": APP_NAME, "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port},
        "logging_config": serve_logging(settings).model_dump(mode="json", exclude={"logs_dir"}),
        "applications": [application],
    }


class _Block(str):
    """Text that YAML shows line by line."""

    __slots__ = ()


class _BlockDumper(yaml.SafeDumper):
    pass


_BlockDumper.add_representer(_Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|"))


def build_application(settings: Settings, *, engine: str = REAL_ENGINE, logs_dir: Path | None = None) -> Application:
    """Gateway and engines, wired. `settings` has Redis and the admin key resolved. `logs_dir`: None = where Ray's are."""
    assert settings.redis_url is not None
    assert settings.admin_key is not None
    blob_url = settings.blob_url or f"file://{settings.home / 'blobs'}"
    telemetry = telemetry_plan(settings)
    logging_config = serve_logging(settings, logs_dir)
    engines: dict[str, Application] = {}
    for model in settings.models:
        model_id = model.id or served_id(model.base_model)
        replica = ReplicaPlan(model, model_id, settings.home, blob_url, settings.redis_url, engine, telemetry)
        engines[model_id] = _engine(replica, settings.drain_s, logging_config)
    plan = GatewayPlan(
        redis_url=settings.redis_url,
        blob_url=blob_url,
        admin_key_sha256=hash_key(settings.admin_key.get_secret_value()),
        upload_dir=settings.home / "uploads",
        max_upload_bytes=settings.max_upload_bytes,
        training=_training(settings, blob_url),
        max_training_jobs=settings.max_training_jobs,
        pull_sources=settings.pull_sources,
        webhook_private_hosts=settings.webhook_private_hosts,
        metrics_key_sha256=None if settings.metrics_key is None else hash_key(settings.metrics_key.get_secret_value()),
        telemetry=telemetry,
        models={
            model_id: ServedModel(deployment_name(m), m.min_replicas, m.most_replicas, m.tensor_parallel_size)
            for model_id, m in zip(engines, settings.models, strict=True)
        },
    )
    deployment = serve.deployment(
        name="Gateway",
        max_ongoing_requests=_GATEWAY_ONGOING,
        ray_actor_options={"num_cpus": settings.gateway_cpus, "resources": settings.gateway_resources},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=settings.gateway_drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=logging_config,
        **_gateways(settings),
    )(serve.ingress()(Gateway))
    return deployment.bind(plan, engines)


def _gateways(settings: Settings) -> dict[str, Any]:
    """How many there are."""
    least, most = settings.gateway_replicas, settings.max_gateway_replicas
    if most is None or most == least:
        return {"num_replicas": least}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least, max_replicas=most, target_ongoing_requests=_GATEWAY_TARGET, upscale_delay_s=10.0
        )
    }


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
        resources=settings.training_resources,
    )


def deployment_name(model: ModelSettings) -> str:
    """The engine deployment's name in Serve."""
    return f"EngineReplica-{model.slug}"


def _engine(plan: ReplicaPlan, drain_s: float, logging_config: LoggingConfig) -> Application:
    model = plan.model
    # More than the engine itself takes: a full queue is then refused by the engine, at once and with a reason, rather
    # than waiting unseen in a router.
    ongoing = 2 * (model.max_num_seqs + model.max_waiting)
    deployment = serve.deployment(
        name=deployment_name(model),
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.adapter_router:AdapterRouter",
            request_router_kwargs={"batch": model.max_num_seqs},
            request_routing_stats_period_s=_REPORT_S,
        ),
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=logging_config,
        **_replicas(model),
        **_places(model),
    )(EngineReplica)
    return deployment.bind(plan)


def _replicas(model: ModelSettings) -> dict[str, Any]:
    """How many there are."""
    if not model.autoscales:
        return {"num_replicas": model.min_replicas}
    policy = AutoscalingPolicy(
        policy_function="deployments.scaling_policy:RequestRatePolicy", policy_kwargs=scaling_options(model)
    )
    with warnings.catch_warnings():
        # Ray 2.60 calls the interval deprecated, and reads nothing else.
        warnings.filterwarnings("ignore", message="The `metrics_interval_s` field", category=DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=model.min_replicas,
            # Only where nothing else is known: set, it is also where every redeployment begins again.
            initial_replicas=None if model.min_replicas else 1,
            max_replicas=model.most_replicas,
            policy=policy,
            # Delays and steps are the policy's own; Serve's would come on top.
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            metrics_interval_s=_REPORT_S,
            look_back_period_s=3 * _REPORT_S,
        )
    return {"autoscaling_config": config}


def scaling_options(model: ModelSettings) -> dict[str, Any]:
    """`slipstream.cluster.scaling.ScalingOptions` of a model."""
    return {
        "min_replicas": model.min_replicas,
        "max_replicas": model.most_replicas,
        "target_requests_per_s": model.target_requests_per_s,
        "request_tokens": model.request_tokens,
        "max_queue_wait_s": model.scale_queue_wait_s,
        "max_slot_pressure": model.scale_slot_pressure,
        "up_delay_s": model.scale_up_delay_s,
        "down_delay_s": model.scale_down_delay_s,
        "to_zero_delay_s": model.scale_to_zero_delay_s,
        "cool_down_s": model.scale_cool_down_s,
    }


def _places(model: ModelSettings) -> dict[str, Any]:
    """Where a replica runs: several ranks are placed together, on one node where that is possible."""
    own: dict[str, Any] = {
        "num_cpus": model.engine_cpus,
        "num_gpus": model.engine_gpus,
        "resources": model.engine_resources,
    }
    if model.tensor_parallel_size == 1:
        return {"ray_actor_options": own}
    bundle = {
        "CPU": model.engine_cpus,
        **({"GPU": model.engine_gpus} if model.engine_gpus else {}),
        **model.engine_resources,
    }
    return {
        "ray_actor_options": own,
        "placement_group_bundles": [bundle] * model.tensor_parallel_size,
        "placement_group_strategy": "PACK",
    }
