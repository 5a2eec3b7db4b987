"""What an engine replica is built from, on whatever node: plain data, known without Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from deployments.telemetry import TelemetryPlan
from slipstream.config import ModelSettings
from slipstream.engine.config import EngineConfig

REAL_ENGINE = "slipstream.engine.service:EngineService"
_ENGINE_FIELDS = (
    "dtype",
    "quantize",
    "device",
    "max_batched_tokens",
    "long_prompt_stretch",
    "max_num_seqs",
    "max_waiting",
    "max_queue_wait_s",
    "kv_cache_bytes",
    "block_size",
    "max_model_len",
    "prefix_caching",
    "fully_sharded_loras",
    "max_draft",
    "disable",
    "adapter_slots",
    "host_adapter_bytes",
    "adapter_fetch_timeout_s",
)


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What a replica is built from: plain data, so that it travels to any node."""

    model: ModelSettings
    model_id: str
    home: Path
    blob_url: str
    redis_url: SecretStr | None = None  # whose changes it follows
    engine: str = (
        REAL_ENGINE  # "module:callable" taking (EngineConfig, AdapterSource, observer=…); tests may put a fake here
    )
    telemetry: TelemetryPlan = field(default_factory=TelemetryPlan)

    @property
    def adapter_cache(self) -> Path:
        """Where fetched adapters are kept."""
        return self.home / "cache" / "adapters"


def engine_config(plan: ReplicaPlan, path: Path) -> EngineConfig:
    """The engine's part of a model's settings. Threads are explicit: Ray sets OMP_NUM_THREADS to the reserved CPUs."""
    model = plan.model
    shared: dict[str, Any] = {name: getattr(model, name) for name in _ENGINE_FIELDS}
    return EngineConfig(
        model_path=str(path),
        model_id=plan.model_id,
        num_threads=on_its_cores(model).engine_threads,
        scratch_dir=str(plan.adapter_cache),  # one file system with the cache: adapters are hard-linked
        **shared,
    )


def on_its_cores(model: ModelSettings) -> ModelSettings:
    """As many threads as cores that Ray sets aside: a node of a cluster is shared."""
    return model.model_copy(update={"engine_threads": model.engine_threads or max(1, math.ceil(model.engine_cpus))})
