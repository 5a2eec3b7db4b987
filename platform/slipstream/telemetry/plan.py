"""Where a process's spans go: plain data, known without OpenTelemetry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import SecretStr

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


@dataclass(frozen=True, slots=True)
class TracingPlan:
    """Where spans go: plain data, so that it travels to any node."""

    endpoint: str | None = None  # base address of an OTLP/HTTP collector; None = what the variables say
    variables: Mapping[str, SecretStr] = field(default_factory=dict)  # `OTEL_*`; headers among them hold keys

    @property
    def on(self) -> bool:
        """Whether anybody wants spans."""
        if self._says("OTEL_SDK_DISABLED") == "true" or self._says("OTEL_TRACES_EXPORTER") == "none":
            return False
        return self.endpoint is not None or any(map(self._says, _ENDPOINTS))

    def _says(self, name: str) -> str:
        value = self.variables.get(name)
        return value.get_secret_value().strip() if value is not None else ""

    @property
    def protocol(self) -> str:
        """What the variables ask for."""
        return next(filter(None, map(self._says, _PROTOCOLS)), "http/protobuf")
