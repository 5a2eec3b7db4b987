"""Logs and traces of the processes that Ray Serve starts: what the settings say of them, carried to any node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from slipstream.config import Settings
from slipstream.process_env import opentelemetry_variables
from slipstream.telemetry.logs import forward_logs
from slipstream.telemetry.plan import TracingPlan

if TYPE_CHECKING:
    from ray.serve.schema import LoggingConfig

    from slipstream.telemetry.tracing import Tracing

SERVE_LOGGER = "ray.serve"  # its handlers write each replica's file, rotate it, and know the encoding


@dataclass(frozen=True, slots=True)
class TelemetryPlan:
    """What every gateway and replica is told: plain data."""

    tracing: TracingPlan = field(default_factory=TracingPlan)
    log_level: str = "INFO"
    log_format: str = "text"


def telemetry_plan(settings: Settings) -> TelemetryPlan:
    """The settings' part, and OpenTelemetry's own variables of this process."""
    variables: Mapping[str, SecretStr] = {k: SecretStr(v) for k, v in sorted(opentelemetry_variables().items())}
    return TelemetryPlan(TracingPlan(settings.otlp_endpoint, variables), settings.log_level, settings.log_format)


def serve_logging(settings: Settings, logs_dir: Path | None = None) -> LoggingConfig:
    """The same for Serve itself. Its access log is off: ours says more, and the proxy's would say it twice."""
    from ray.serve.schema import LoggingConfig  # noqa: PLC0415 - `local_ray` sets Ray's switches before it is imported

    return LoggingConfig(
        encoding=settings.log_format.upper(),
        log_level=settings.log_level,
        logs_dir=str(logs_dir) if logs_dir is not None else None,
        enable_access_log=False,
        additional_log_standard_attrs=["name"] if settings.log_format == "json" else [],  # which logger it was
    )


def begin_telemetry(plan: TelemetryPlan, component: str, instance: str) -> Tracing | None:
    """Once in each gateway and replica. Returns its spans, None where tracing is off.

    Without this, what we log would reach Serve's file as bare text of standard error, if at all.
    """
    forward_logs(SERVE_LOGGER, plan.log_level, as_text=plan.log_format == "text")
    if not plan.tracing.on:
        return None
    from slipstream.telemetry.tracing import start_tracing  # noqa: PLC0415 - not where nobody wants it

    return start_tracing(plan.tracing, component, instance)
