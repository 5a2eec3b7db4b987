"""Settings: read once, frozen, nothing unknown accepted.

Sources, the later ones win: the defaults below; the YAML file `SLIPSTREAM_CONFIG` (default
`$SLIPSTREAM_HOME/slipstream.yaml`); `SLIPSTREAM_*` variables (and `PORT`); what the caller of `load_settings` passes.
Model settings given flat are defaults for every entry of `models`. `load_settings` is the only place of the platform
that reads the environment.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from slipstream.engine.config import FastPath
from slipstream.errors import ConfigError

ENV_PREFIX = "SLIPSTREAM_"
DEFAULT_HOME = Path("~/.slipstream")
DEFAULT_MODEL = "SmolLM2-135M-Instruct"

# SLIPSTREAM_ variables that belong to others: the command line client, this file's own source, and the tests.
_FOREIGN = {"SLIPSTREAM_CONFIG", "SLIPSTREAM_URL", "SLIPSTREAM_API_KEY", "SLIPSTREAM_TEST_HOME"}

GIB = 1 << 30
Count = Annotated[int, Field(ge=1)]


class ModelDefaults(BaseModel):
    """What every base model has; given flat it holds for all of `models`."""

    base_model: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        description="Base model: a Hugging Face id, a local folder, or the built-in default.",
    )
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto",
        description="Number format of weights and KV cache; `auto`: bfloat16 where the processor has it, else float32 (on a "
        "GPU float16). Name one where replicas run on different processors: texts differ between formats.",
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None,
        description="Keep base linears as `int8` or (CPU) `int4`: less memory, int8 faster at few requests (AVX512-BF16), "
        "answers may differ "
        "from the full model's. Adapters, streams and LM head stay as they are.",
    )
    device: str = Field("auto", description="Torch device; `auto` takes a GPU when there is one.")
    min_replicas: int = Field(
        1,
        ge=0,
        description="Fewest engine replicas of each model; 0 = none while nobody asks, and the first request waits.",
    )
    max_replicas: Count | None = Field(
        None,
        description="Most engine replicas of each model; empty = `min_replicas` (fixed), or 1 if that is 0.",
    )
    tensor_parallel_size: Count = Field(
        1, description="Processes (ranks) that share one engine replica, each on its own GPU or cores."
    )
    engine_cpus: float = Field(
        1.0, gt=0, description="CPU cores that Ray sets aside for each rank of an engine replica."
    )
    engine_gpus: float = Field(0.0, ge=0, description="GPUs that Ray sets aside for each rank of an engine replica.")
    engine_resources: dict[str, float] = Field(
        {},
        description="Custom Ray resources, as JSON, that each rank of an engine replica asks for: ties it to some nodes.",
    )
    engine_threads: Count | None = Field(
        None,
        description="Torch threads of each rank; empty = all cores between its ranks, on a cluster as many as `engine_cpus`.",
    )
    target_requests_per_s: float = Field(
        2.0,
        gt=0,
        description="Requests a second that one replica is meant to take: what the number of replicas follows.",
    )
    request_tokens: float | None = Field(
        None,
        gt=0,
        description="Tokens of work in the request that `target_requests_per_s` means (answer tokens, and a fifth of the "
        "prompt's); longer ones then count for more. Empty = all count alike.",
    )
    scale_queue_wait_s: float = Field(2.0, gt=0, description="Requests that wait longer ask for more replicas.")
    scale_slot_pressure: float = Field(
        1.0, gt=0, description="More adapters in use or wanted than this, per slot, ask for more replicas."
    )
    scale_up_delay_s: float = Field(
        1.0, ge=0, description="How long more replicas must be wanted until they are started."
    )
    scale_down_delay_s: float = Field(120.0, ge=0, description="How long fewer must be wanted until some are stopped.")
    scale_to_zero_delay_s: float = Field(300.0, ge=0, description="How long nobody must ask until the last is stopped.")
    scale_cool_down_s: float = Field(30.0, ge=0, description="How long none is stopped after one was started.")
    max_model_len: Count | None = Field(
        None, description="Longest prompt and answer together, in tokens; empty = the model's own context window."
    )
    max_batched_tokens: Count = Field(512, description="Tokens of one engine step: decodes, drafts and prefill chunks.")
    long_prompt_stretch: float = Field(
        2.5,
        gt=1,
        allow_inf_nan=False,
        description="While others decode, a prompt longer than `max_batched_tokens` may make a step this many times as long.",
    )
    max_num_seqs: Count = Field(64, description="Sequences that run at once in a replica.")
    max_waiting: Count = Field(256, description="Requests that wait in a replica; more are answered 429.")
    max_queue_wait_s: float = Field(
        60.0, gt=0, description="Requests that would wait longer in a replica are answered 429 at once."
    )
    kv_cache_bytes: int = Field(GIB, ge=1 << 20, description="Bytes of a replica's KV cache.")
    block_size: Count = Field(16, description="Tokens of one KV block.")
    prefix_caching: bool = Field(True, description="Keep the KV blocks of prompts for requests that begin alike.")
    fully_sharded_loras: bool = Field(
        False,
        description="Where ranks share a replica, each keeps only its share of every adapter, for one more exchange a group "
        "of linears: less memory, slower steps.",
    )
    max_draft: int = Field(8, ge=0, le=8, description="Longest draft, whatever an adapter's number of streams.")
    disable: tuple[FastPath, ...] = Field(
        (),
        description="Fast paths to leave out, to compare or to find a fault, as a JSON list of "
        + ", ".join(f"`{path}`" for path in FastPath)
        + ".",
    )
    adapter_slots: Count = Field(32, description="Adapters held on the device at once.")
    host_adapter_bytes: int = Field(2 * GIB, ge=1 << 20, description="Bytes of adapters held in host memory.")
    adapter_fetch_timeout_s: float = Field(
        60.0, gt=0, description="Seconds until an adapter that is being fetched is given up."
    )
    adapter_cache_bytes: int = Field(8 * GIB, ge=1 << 20, description="Bytes of downloaded adapters kept on disk.")

    @field_validator("max_replicas")
    @classmethod
    def _not_below_min(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_replicas", 0)
        if most is not None and most < least:
            raise ValueError(f"it is below min_replicas, which is {least}")
        return most


class ModelSettings(ModelDefaults):
    """One base model that is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str | None = Field(
        None, min_length=1, description="Name in the `model` field of requests; empty = the model's own."
    )

    @property
    def most_replicas(self) -> int:
        """The upper bound, whether it was set or not."""
        return self.max_replicas or max(1, self.min_replicas)

    @property
    def autoscales(self) -> bool:
        """Whether the number of replicas may change."""
        return self.min_replicas < self.most_replicas

    @property
    def slug(self) -> str:
        """The model's name as part of a deployment name."""
        name = self.id or Path(self.base_model).name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "model"


class Settings(ModelDefaults, BaseSettings):
    """All settings of one Slipstream process tree."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    home: Path = Field(DEFAULT_HOME, description="Data folder: models, embedded Redis, blobs, keys, logs.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=1, le=65535, validation_alias="port", description="Port to listen on (variable `PORT`).")
    admin_key: SecretStr | None = Field(
        None, description="Admin key; empty = generated once and kept in the data folder."
    )
    metrics_key: SecretStr | None = Field(
        None,
        description="Key with which `/metrics` shows what names tenants and adapters; empty = the admin key alone does.",
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Address of the registry: `redis://:password@host:6379/0` (`rediss://` with TLS), `redis+cluster://…` or "
        "`redis+sentinel://:password@sentinel:26379,other:26379/service/0`; empty = an embedded server.",
    )
    blob_url: str | None = Field(
        None,
        description="Where adapter files are kept (`file://`, `s3://`, `gs://`, `az://`); empty = the data folder.",
    )
    max_upload_bytes: int = Field(2 * GIB, ge=1, description="Largest adapter upload.")
    pull_sources: tuple[str, ...] = Field(
        ("hf://",),
        description="Where tenants may have adapters pulled from, as a JSON list of what URLs begin with: "
        "`s3://bucket/folder/`, `gs://…`, `az://…`, `hf://owner/`. Buckets are read with the server's own credentials, the "
        "hub without any.",
    )
    webhook_private_hosts: tuple[str, ...] = Field(
        (),
        description="Hosts, as a JSON list, that webhooks may name although they are inside this network, or `http://`. "
        "Tenants choose a webhook's address and the server calls it.",
    )
    demo_adapters: bool = Field(True, description="Whether `slipstream serve` publishes the demo adapters.")
    gateway_replicas: Count = Field(1, description="Gateway replicas; with `max_gateway_replicas` the fewest.")
    max_gateway_replicas: Count | None = Field(None, description="Most of them, by open requests; empty = fixed.")
    gateway_cpus: float = Field(0.5, ge=0, description="CPU cores that Ray sets aside for each gateway replica.")
    gateway_resources: dict[str, float] = Field(
        {}, description="Custom Ray resources that each gateway asks for, as JSON."
    )
    drain_s: float = Field(
        60.0,
        ge=0,
        description="Seconds that a stopping replica has to finish what it runs; the rest goes on elsewhere.",
    )
    gateway_drain_s: float = Field(
        300.0,
        ge=0,
        description="The same of a gateway; its requests may be waiting for engine replicas that are replaced, too.",
    )
    training_cpus: float = Field(1.0, gt=0, description="CPU cores, and so torch threads, of each training job.")
    training_gpus: float = Field(0.0, ge=0, description="GPUs that Ray sets aside for each training job.")
    training_resources: dict[str, float] = Field({}, description="Custom Ray resources that each asks for, as JSON.")
    max_training_jobs: Count = Field(1, description="Training jobs that run at once; more wait in the queue.")
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+",
        description="Where traces go: an OpenTelemetry collector's base address for OTLP over HTTP, as "
        "`http://collector:4318`; empty = what `OTEL_EXPORTER_OTLP_ENDPOINT` says, or no traces. Other `OTEL_*` variables "
        "hold as well.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people, or `json` for collectors.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")
    models: tuple[ModelSettings, ...] = Field(
        (), description="Models served, each with the fields above; empty = one, from the flat settings."
    )

    from_file: ClassVar[dict[str, Any]] = {}  # what `load_settings` found in the YAML file

    @model_validator(mode="before")
    @classmethod
    def _flat_fields_are_defaults(cls, data: Any) -> Any:
        """Give every model the flat settings that it does not override."""
        if not isinstance(data, dict):
            return data
        models = data.get("models")
        models = [{}] if models is None or models in ((), []) else models
        if not isinstance(models, (list, tuple)) or not all(isinstance(entry, dict) for entry in models):
            return data  # validation of `models` itself names what is wrong
        flat = {name: data[name] for name in ModelDefaults.model_fields if name in data}
        return {**data, "models": [{**flat, **entry} for entry in models]}

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("max_gateway_replicas")
    @classmethod
    def _not_below_gateway_replicas(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("gateway_replicas", 1)
        if most is not None and most < least:
            raise ValueError(f"it is below gateway_replicas, which is {least}")
        return most

    @field_validator("admin_key", "metrics_key")
    @classmethod
    def _long_enough(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and len(key.get_secret_value()) < 16:
            raise ValueError("such a key must have at least 16 characters")
        return key

    @field_validator("models")
    @classmethod
    def _distinct(cls, models: tuple[ModelSettings, ...], info: ValidationInfo) -> tuple[ModelSettings, ...]:
        slugs = [model.slug for model in models]
        twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
        if twice:
            raise ValueError(f"two models are named {twice[0]!r}: give each an `id` of its own")
        return models

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Caller, then environment, then the YAML file."""
        return (init_settings, env_settings, InitSettingsSource(settings_cls, cls.from_file))


def load_settings(**overrides: Any) -> Settings:
    """Read file and environment. Raises `ConfigError`, which names the field or variable and says what to do."""
    _check_variable_names(os.environ)
    path = _config_path(overrides)
    bound = type("Settings", (Settings,), {"from_file": _read_file(path) if path else {}, "__module__": __name__})
    try:
        loaded: Settings = bound(**overrides)
    except ValidationError as error:
        raise ConfigError(_sentence(error, path)) from error
    except SettingsError as error:
        raise ConfigError(
            f"A setting could not be read: {error}. Lists such as SLIPSTREAM_MODELS are written as JSON."
        ) from error
    values = {name: getattr(loaded, name) for name in Settings.model_fields}
    return Settings.model_construct(loaded.model_fields_set, **values)


def client_settings() -> tuple[str, str]:
    """Address and key that a client uses when it is told none: SLIPSTREAM_URL and SLIPSTREAM_API_KEY ("" if unset)."""
    return os.environ.get("SLIPSTREAM_URL") or "http://127.0.0.1:8000", os.environ.get("SLIPSTREAM_API_KEY", "")


def _config_path(overrides: dict[str, Any]) -> Path | None:
    named = os.environ.get("SLIPSTREAM_CONFIG")
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ConfigError(f"SLIPSTREAM_CONFIG names {named!r}, which is not a file. Correct it or unset it.")
        return path
    home = Path(overrides.get("home") or os.environ.get("SLIPSTREAM_HOME") or DEFAULT_HOME).expanduser()
    path = home / "slipstream.yaml"
    return path if path.is_file() else None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise ConfigError(f"{path} must hold `setting: value` lines.")
    return data


def _check_variable_names(names: Iterable[str]) -> None:
    """Refuse a misspelt variable. Others are left alone: Kubernetes adds SLIPSTREAM_SERVICE_HOST and its like by
    itself."""
    known = {variable_name(field) for field in Settings.model_fields} | _FOREIGN
    for name in names:
        if name.startswith(ENV_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            if close:
                raise ConfigError(f"{name} is not a setting. Did you mean {close[0]}?")


def variable_name(field: str) -> str:
    """The environment variable of a field of `Settings`."""
    return "PORT" if field == "port" else ENV_PREFIX + field.upper()


def _sentence(error: ValidationError, path: Path | None) -> str:
    """The first thing that is wrong, where it may have been said, and the rule it breaks."""
    problems = error.errors(include_url=False)
    # A flat setting is copied into every model: report it under its own name rather than as models.0.
    first = next((p for p in problems if p["loc"][:1] != ("models",)), problems[0])
    loc = first["loc"]
    if (
        len(loc) == 3
        and loc[0] == "models"
        and loc[2] in ModelDefaults.model_fields
        and (loc[2],) in {p["loc"] for p in problems}
    ):
        loc = (loc[2],)
    field = ".".join(str(part) for part in loc) or "settings"
    file = str(path) if path else "the configuration file"
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(loc[-1]), [*Settings.model_fields, "id"], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{field!r} in {file} is not a setting.{hint}"
    shown = "" if loc[0] in {"admin_key", "metrics_key", "redis_url"} else f" (got {first['input']!r})"
    top = str(loc[0]) if loc else ""
    where = f"{variable_name(top)}, or {field!r} in {file}," if top in Settings.model_fields else f"{field!r}"
    return f"{where} is wrong{shown}: {first['msg'].removeprefix('Value error, ')}."


def settings_table() -> str:
    """All settings as a Markdown table; the README carries it and a test compares."""
    rows = ["| variable | in the file | default | meaning |", "|---|---|---|---|"]
    names = [
        *(n for n in Settings.model_fields if n not in ModelDefaults.model_fields and n != "models"),
        *ModelDefaults.model_fields,
        "models",
    ]
    for name in names:
        field = Settings.model_fields[name]
        rows.append(f"| `{variable_name(name)}` | `{name}` | {_default_text(field.default)} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default_text(value: object) -> str:
    return "" if value is None or value in ((), {}) else f"`{value}`"
