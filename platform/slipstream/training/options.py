"""From the body of POST /v1/fine_tuning/jobs to a `TrainingConfig`: the part of the options a job may set, and how
OpenAI's hyperparameters become ours. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from adapter_registry.jobs import Hyperparameters, JobRecord
from adapter_registry.records import Name
from slipstream.errors import InvalidRequest
from slipstream.training.config import TrainingConfig, TrainingOptions

DATA_FILE, VALIDATION_FILE = "training_file", "validation_file"  # stems in the job's folder, and fields of the body
_MAX_BYTES = 16_384  # of all options: they are kept with the job
_EVENTS, _OUTPUT, _ADAPTER = "events.jsonl", "run", "adapter"


class JobOptions(TrainingOptions):
    """The field `slipstream` of the body. What is not sent keeps the trainer's default."""

    name: Name | None = Field(None, description="The adapter's name; by default the field `suffix`.")
    adapter: str | None = Field(
        None, max_length=200, description="A published adapter, as `name` or `name@3`: what turbo and medusa speed up."
    )

    def chosen(self, hyperparameters: Hyperparameters, seed: int) -> dict[str, Any]:
        """The trainer's options that this job sets, as JSON. Raises `InvalidRequest` for a value that is given twice,
        and for values that do not go together."""
        sent = self.model_dump(mode="json", exclude_unset=True, exclude={"name", "adapter"})
        for field, value in _from_openai(hyperparameters, self).items():
            if field in sent:
                raise InvalidRequest(
                    f"'slipstream.{field}' and OpenAI's hyperparameters both set it: leave one of them out.",
                    param=f"slipstream.{field}",
                )
            sent[field] = value
        try:
            size = len(json.dumps(sent, ensure_ascii=False).encode())
        except UnicodeEncodeError:
            raise InvalidRequest(
                "'slipstream' holds half of a surrogate pair, which is not text.", param="slipstream"
            ) from None
        if size > _MAX_BYTES:
            raise InvalidRequest(f"'slipstream' is larger than {_MAX_BYTES} bytes.", param="slipstream")
        if "seed" in sent:
            raise InvalidRequest("Send 'seed' beside 'model', not in 'slipstream'.", param="slipstream.seed")
        sent["seed"] = seed
        try:
            TrainingConfig(**sent, data=Path(), output=Path(), adapter=Path() if self.adapter else None)
        except ValidationError as error:
            raise _refusal(error) from error
        return sent


class JobFolder:
    """Where things lie in a job's folder; the worker is told by `config.json`."""

    def __init__(self, root: Path, job_id: str) -> None:
        self.path = root / job_id
        self.config = self.path / "config.json"
        self.events = self.path / _EVENTS
        self.log = self.path / "worker.log"
        self.adapter = self.path / _ADAPTER
        self.output = self.path / _OUTPUT

    def data(self, stem: str, filename: str) -> Path:
        """Where an uploaded file goes: under a name of ours, with the ending that says how to read it."""
        ending = Path(filename).suffix.lower()
        return self.path / f"{stem}{ending if ending in ('.csv', '.json') else '.jsonl'}"


def job_config(
    job: JobRecord, folder: JobFolder, base: Path, files: dict[str, Path], threads: int, device: str = "auto"
) -> TrainingConfig:
    """What the worker is told. `files` maps `training_file` and perhaps `validation_file` to where they lie."""
    return TrainingConfig.model_validate(
        {
            **job.options,
            "base": str(base),
            "name": job.name,
            "data": files[DATA_FILE],
            "valid": files.get(VALIDATION_FILE),
            "adapter": folder.adapter if job.adapter_digest else None,
            "output": folder.output,
            "threads": threads,
            "device": device,
            "resume": job.attempt > 1,
        }
    )


def _from_openai(hyperparameters: Hyperparameters, options: TrainingOptions) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if hyperparameters.n_epochs != "auto":
        found["epochs"] = hyperparameters.n_epochs
    if hyperparameters.batch_size != "auto":
        found["batch_size"] = hyperparameters.batch_size
    if hyperparameters.learning_rate_multiplier != "auto":
        times = hyperparameters.learning_rate_multiplier
        found["learning_rate"] = options.learning_rate * times
        found["stream_learning_rate"] = options.stream_learning_rate * times
    return found


def _refusal(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False)[0]
    where = ".".join(["slipstream", *map(str, first["loc"])])
    return InvalidRequest(f"'{where}': {first['msg'].removeprefix('Value error, ')}.", param=where)
