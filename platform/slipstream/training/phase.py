"""One stretch of training: model in, trainable weights out. What a single process runs, and each Ray Train worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from slipstream.engine.loader import pick_device
from slipstream.errors import InvalidRequest
from slipstream.training.config import TrainingConfig
from slipstream.training.data import Encoded
from slipstream.training.events import Message, Observer
from slipstream.training.model import TRAINABLE, TurboModel, build_model
from slipstream.training.sharding import shard_frozen
from slipstream.training.trainer import TurboTrainer, stop_on_sigterm

OUTCOME = "outcome.json"


@dataclass(frozen=True, slots=True)
class PhaseJob:
    """Everything a phase needs; plain data, so that it travels to workers.

    folder: the phase's own, for checkpoints and its outcome. after: a finished phase to go on from, its LoRA frozen.
    """

    config: TrainingConfig
    base: Path
    train: list[Encoded]
    valid: list[Encoded]
    pad_id: int
    folder: Path
    after: Path | None = None


@dataclass(frozen=True, slots=True)
class PhaseOutcome:
    """How a phase ended. `stopped`: a signal ended it early; its checkpoint is there to go on from."""

    steps: int
    tokens: int  # input tokens seen, padding left out
    seconds: float
    stopped: bool = False
    history: list[dict[str, float]] = field(default_factory=list)  # Trainer's log, step by step


class Fit(Protocol):
    """Runs a phase somewhere: `fit_here`, or on Ray Train workers (`deployments.train_workers`)."""

    def __call__(self, job: PhaseJob, observer: Observer) -> PhaseOutcome:
        """Train until the end, or raise. Afterwards the trainable weights lie in `job.folder`."""
        ...


def fit_here(job: PhaseJob, observer: Observer) -> PhaseOutcome:
    """In this process. A phase that has ended before is not run again. Raises `InvalidRequest` for several workers."""
    if job.config.workers > 1:
        raise InvalidRequest(
            "Several workers need Ray: give train() the fit that deployments.train_workers.fit_on_ray makes.",
            param="workers",
        )
    done = read_outcome(job.folder)
    return done if done is not None else run_phase(job, observer)


def run_phase(
    job: PhaseJob, observer: Observer, workers: int = 1, should_stop: Callable[[], bool] | None = None
) -> PhaseOutcome:
    """Train in this process, as one of `workers` with torch.distributed set up; the first writes into `job.folder`.

    `should_stop`, where SIGTERM cannot say so: asked after each step; one worker's yes stops all, with a checkpoint.
    """
    model = load_phase_model(job)
    if job.config.fsdp:
        if workers == 1:
            raise InvalidRequest("fsdp shares the model out among workers: give workers 2 or more.", param="fsdp")
        shard_frozen(model, pick_device(job.config.device))
    trainer = TurboTrainer(
        model,
        job.config,
        job.train,
        job.valid,
        job.pad_id,
        observer,
        workers=workers,
        output=job.folder / "checkpoints",
    )
    checkpoint = _newest_checkpoint(job.folder / "checkpoints") if job.config.resume else None
    if checkpoint is not None:
        observer(Message(f"Going on from {checkpoint.name}."))
    with stop_on_sigterm(trainer, should_stop) as clockwork:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    history = [{k: float(v) for k, v in row.items() if isinstance(v, int | float)} for row in trainer.state.log_history]
    outcome = PhaseOutcome(
        trainer.state.global_step, trainer.tokens, trainer.clock.seconds, clockwork.stopped_by_signal, history
    )
    if trainer.is_world_process_zero() and not outcome.stopped:
        trainer.turbo.save_trainable(job.folder)
        partial = job.folder / f"{OUTCOME}.partial"  # half a file would stop every resume
        partial.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        partial.replace(job.folder / OUTCOME)
    return outcome


def load_phase_model(job: PhaseJob, *, finished: bool = False) -> TurboModel:
    """The phase's model as it begins, or with the weights that the phase ended with."""
    model = build_model(job.config, job.base, max(len(row.ids) for row in job.train))
    if job.after is not None:
        model.load_trainable(job.after)
        model.freeze_lora()
    if finished:
        model.load_trainable(job.folder)
    return model


def read_outcome(folder: Path) -> PhaseOutcome | None:
    """How the phase in `folder` ended, if it has."""
    path = folder / OUTCOME
    if not path.is_file() or not (folder / TRAINABLE).is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return PhaseOutcome(**found)


def _newest_checkpoint(folder: Path) -> Path | None:
    # Trainer writes its state last: a checkpoint without it was cut short, when the process was killed.
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def set_threads(threads: int | None) -> None:
    """Torch threads of this process."""
    if threads is not None:
        torch.set_num_threads(threads)
