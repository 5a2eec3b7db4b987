"""Training on several workers through Ray Train: `slipstream train --workers 2`, and `fit_on_ray` for Python.

Every worker runs the same phase with torch.distributed between them: NCCL on GPUs, one each; gloo on CPUs. The phase's folder
must be the same for all: one machine, or a file system that they share. The first worker writes checkpoints, outcome
and events there; the driver reads them, and asks the workers to stop by a file in it.

Ray is the one this process is connected to (`ray.init` with the cluster's address comes first then); else a private one
on this machine, gone afterwards. The FSDP of `TrainingConfig.fsdp` is `slipstream.training.sharding`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from deployments.local_ray import prepare_ray_environment
from slipstream.errors import InvalidRequest, SlipstreamError, Unavailable
from slipstream.training.config import TrainingConfig
from slipstream.training.events import CheckpointSaved, Event, EventLog, Message, Metrics, Observer, Phase
from slipstream.training.phase import Fit, PhaseJob, PhaseOutcome, read_outcome, run_phase, set_threads

EVENTS, STOP, FAILURE = "worker-events.jsonl", "stop", "workers.log"
STOPPED = 143  # 128 + SIGTERM
POLL_S = 0.2
PLACEMENT_TRIES = 10  # of a minute each: a cluster that is full, or must first grow
_OBJECT_STORE_BYTES = 512 << 20  # the training rows go through it
_EVENTS: dict[str, type[Event]] = {
    "phase": Phase,
    "message": Message,
    "metrics": Metrics,
    "checkpoint": CheckpointSaved,
}


def fit_on_ray(config: TrainingConfig) -> Fit:
    """A `Fit` that runs phases on `config.workers` Ray Train workers.

    It raises `InvalidRequest` when rows or the cluster do not go round, `Unavailable` when a worker dies or the folder
    is not shared, and what a worker raises of our own. SIGTERM saves a checkpoint and stops, as with one worker.
    """

    def fit(job: PhaseJob, observer: Observer) -> PhaseOutcome:
        job = _absolute(job)
        done = read_outcome(job.folder)
        if done is not None:
            return done
        share = min(job.config.batch_size, len(job.train))
        if share < config.workers:
            raise InvalidRequest(
                f"workers is {config.workers}, but an optimiser step has only {share} rows to share out. Give fewer "
                "workers, or a larger batch_size.",
                param="workers",
            )
        with _ray(config.workers):
            return _Run(job, config.workers, observer).run()

    return fit


def _absolute(job: PhaseJob) -> PhaseJob:
    """Ray Train's workers run in a folder of their own."""
    config, paths = job.config, ("data", "valid", "output", "adapter")
    found = {name: getattr(config, name) for name in paths}
    update = {name: path.absolute() for name, path in found.items() if path is not None}
    return replace(
        job,
        config=config.model_copy(update=update),
        base=job.base.absolute(),
        folder=job.folder.absolute(),
        after=job.after.absolute() if job.after is not None else None,
    )


@contextmanager
def _ray(workers: int) -> Iterator[None]:
    """A Ray while the body runs: the caller's, or a private one."""
    if "ray" not in sys.modules:
        prepare_ray_environment()
    import ray  # noqa: PLC0415 - not at the top: `prepare_ray_environment` comes first

    if ray.is_initialized():
        yield
        return
    # macOS's folder for temporary files is too long a path for Ray's sockets.
    parent = "/tmp" if sys.platform == "darwin" else None  # noqa: S108
    logging.getLogger("ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="slipstream-train-", dir=parent, ignore_cleanup_errors=True) as scratch:
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, workers),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=scratch,
                _node_ip_address="127.0.0.1",
                _system_config={"worker_niceness": 0},  # by default Ray's workers yield to everything else
            )
            yield
        finally:
            ray.shutdown()


class _Run:
    """One phase on the workers, watched from here."""

    def __init__(self, job: PhaseJob, workers: int, observer: Observer) -> None:
        self._job, self._workers, self._observer = job, workers, observer
        self._result: Any = None
        self._error: BaseException | None = None
        for name in (EVENTS, STOP, FAILURE):
            (job.folder / name).unlink(missing_ok=True)

    def run(self) -> PhaseOutcome:
        """Start the workers and stay until they have ended, passing on what the first of them tells."""
        trainer = self._trainer()
        # In a thread: this one hears signals and passes on events meanwhile.
        thread = threading.Thread(target=self._fit, args=(trainer,), daemon=True)
        with _on_sigterm(self._stop):
            thread.start()
            told = 0
            while thread.is_alive():
                thread.join(POLL_S)
                told = self._pass_on(told)
        if self._error is not None:
            raise self._failure(self._error) from self._error
        return self._outcome()

    def _stop(self) -> None:
        """The workers look after each step. Asked again, before there may be any workers: at once, without a checkpoint."""
        if (self._job.folder / STOP).exists():
            raise SystemExit(STOPPED)
        (self._job.folder / STOP).touch()

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
        from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415

        use_gpu, resources = _resources(self._job.config, self._workers)
        job, workers = self._job, self._workers
        return TorchTrainer(
            lambda: _work(job, workers),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=RunConfig(
                name="ray-train",
                storage_path=str(job.folder),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=PLACEMENT_TRIES),
            ),
        )

    def _fit(self, trainer: Any) -> None:
        try:
            self._result = trainer.fit()
        except BaseException as error:
            self._error = error

    def _pass_on(self, position: int) -> int:
        """Tell the observer the events after byte `position`; returns where the last whole line ended."""
        path = self._job.folder / EVENTS
        if not path.is_file():
            return position
        with path.open("rb") as stream:
            stream.seek(position)
            whole, newline, _ = stream.read().rpartition(b"\n")
        for line in whole.splitlines():
            fields = json.loads(line)
            self._observer(_EVENTS[fields["type"]](**fields))
        return position + len(whole) + len(newline)

    def _outcome(self) -> PhaseOutcome:
        told = PhaseOutcome(**self._result.return_value)
        if told.stopped:
            return told
        found = read_outcome(self._job.folder)
        if found is None:
            raise Unavailable(
                f"The workers have ended, but what they trained is not in {self._job.folder}. Choose an output on a file "
                "system that all of them share with this machine."
            )
        return found

    def _failure(self, error: BaseException) -> SlipstreamError:
        """What a worker raised of our own; else that it died, with all that is known in a file."""
        failures = dict(getattr(error, "worker_failures", {}))
        for failure in failures.values():
            for found in _chain(failure):
                if isinstance(found, SlipstreamError):
                    return found
        log = self._job.folder / FAILURE
        # What Ray Train's own message says is cut short, and its log files go with a private Ray.
        told = [f"Worker {rank}:\n{failure}\n" for rank, failure in sorted(failures.items())] or [f"{error}\n"]
        log.write_text("".join(told), encoding="utf-8")
        who = f"Worker {', '.join(map(str, sorted(failures)))}" if failures else "Ray Train"
        return Unavailable(
            f"{who} failed, and the run was stopped. {log} has the details. Go on from the newest checkpoint with resume."
        )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it wraps: Ray's wrappers name theirs in several ways."""
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, BaseException) or any(found is other for other in seen):
            continue
        seen.append(found)
        yield found
        waiting += [getattr(found, name, None) for name in ("_base_exc", "cause", "__cause__")]


def _resources(config: TrainingConfig, workers: int) -> tuple[bool, dict[str, float]]:
    """Whether the workers get a GPU each, and what each is given. A private Ray's CPUs are shared out."""
    import ray  # noqa: PLC0415

    total = ray.cluster_resources()
    cpus = float(config.threads or max(1, math.floor(total.get("CPU", 1) / workers)))
    cpus = min(cpus, total.get("CPU", 1) / workers)
    gpus = total.get("GPU", 0)
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
        return False, {"CPU": cpus}
    if gpus < workers:
        raise InvalidRequest(
            f"workers is {workers}, but Ray has {gpus:g} GPUs: each worker needs one. Give fewer workers, or device cpu.",
            param="workers",
        )
    return True, {"CPU": cpus, "GPU": 1.0}


@contextmanager
def _on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- on a worker ------------------------------------------------------------------------------------------------------


def _work(job: PhaseJob, workers: int) -> dict[str, Any]:
    """What each worker runs."""
    from ray.train import get_context  # noqa: PLC0415

    if not job.folder.is_dir() or not job.base.exists():
        raise Unavailable(
            f"A worker cannot see {job.folder} or {job.base}: they must lie on a file system that all workers share."
        )
    set_threads(job.config.threads)
    observer: Observer = _silent
    if get_context().get_world_rank() == 0:
        observer = EventLog(job.folder / EVENTS)
    outcome = run_phase(job, observer, workers, should_stop=(job.folder / STOP).exists)
    return asdict(outcome)


def _silent(event: Event) -> None:
    """The first worker tells; the others would say the same."""
