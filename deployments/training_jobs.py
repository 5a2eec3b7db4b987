"""Training jobs on Ray: one detached, named actor for each attempt, apart from the replicas that serve.

Detached, so that gateways and their driver may come and go; named, so that several gateways start an attempt once and any
of them can find it. Its state is in the `JobStore`, never here.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from pydantic import SecretStr
from ray.actor import exit_actor
from ray.exceptions import RayError

from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.jobs import JobRecord
from adapter_registry.redis_jobs import RedisJobs
from adapter_registry.redis_store import RedisStore
from deployments.adapter_source import BlobAdapterSource
from slipstream.base_models import prepare_base_model
from slipstream.errors import Unavailable
from slipstream.protocol import BaseModelSpec
from slipstream.training.jobs import JobRunner
from slipstream.training.supervise import Bench, JobSupervisor

NAMESPACE = "slipstream"
WORKER_MODULE = "slipstream.training.worker"
_ABANDONED_S = 7 * 24 * 3600.0  # a folder that no attempt has touched for so long belongs to a job that was lost


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What a supervisor is built from: plain data, so that it travels to any node."""

    redis_url: SecretStr
    blob_url: str
    home: Path
    base_models: Mapping[str, str]  # id -> what `prepare_base_model` is told
    adapter_cache_bytes: int
    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    command: tuple[str, ...] = ()  # the trainer; empty = ours, with the Python of the node. Tests put a script here
    heartbeat_s: float = 3.0

    @property
    def folder(self) -> Path:
        """Where jobs have their folders."""
        return self.home / "jobs"


class TrainingJobActor:
    """The process that an attempt's supervisor lives in; it ends with the attempt."""

    def __init__(self, plan: TrainingPlan, job: JobRecord, base: BaseModelSpec) -> None:
        self._plan, self._job, self._base = plan, job, base
        self._began = False

    async def run(self) -> None:
        """See the attempt through. Only the first call does anything: every gateway may make one."""
        if self._began:
            return
        self._began = True
        await asyncio.to_thread(remove_abandoned, self._plan.folder)
        url = self._plan.redis_url.get_secret_value()
        jobs, store = RedisJobs.from_url(url), RedisStore.from_url(url)
        try:
            await JobSupervisor(self._job, self._base, self._bench(jobs, store)).run()
        finally:
            await jobs.close()
            await store.close()
            exit_actor()

    def _bench(self, jobs: RedisJobs, store: RedisStore) -> Bench:
        plan = self._plan
        blobs = ObstoreBlobs.from_url(plan.blob_url)
        cache = plan.home / "cache" / "adapters"
        base_model = plan.base_models[self._job.model]

        async def base_path() -> Path:
            return (await asyncio.to_thread(prepare_base_model, base_model, plan.home)).path

        return Bench(
            jobs=jobs,
            store=store,
            blobs=blobs,
            fetch_adapter=BlobAdapterSource(blobs, cache, plan.adapter_cache_bytes).fetch,
            base_path=base_path,
            folder=plan.folder,
            command=plan.command or (sys.executable, "-m", WORKER_MODULE),
            threads=max(1, math.ceil(plan.cpus)),
            device="auto" if plan.gpus else "cpu",  # a GPU that Ray did not set aside belongs to a replica
            heartbeat_s=plan.heartbeat_s,
        )


class RayJobRunner(JobRunner):
    """Starts and finds the actors. Ray's calls wait for its head node, so they run in threads."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan

    async def start(self, job: JobRecord, base: BaseModelSpec) -> None:
        """Have this attempt supervised; nothing happens when it is already."""
        try:
            await asyncio.to_thread(self._start, job, base)
        except RayError as error:
            raise Unavailable("Ray cannot start the training job now.") from error

    async def holds(self, job: JobRecord) -> bool:
        """Whether this attempt's actor is alive, or waits for resources."""
        return await asyncio.to_thread(_find, job) is not None

    async def stop(self, job: JobRecord) -> None:
        """Kill this attempt's actor, and its worker with it; nothing happens when they are gone."""
        actor = await asyncio.to_thread(_find, job)
        if actor is not None:
            with suppress(RayError):
                await asyncio.to_thread(ray.kill, actor)

    def _start(self, job: JobRecord, base: BaseModelSpec) -> None:
        actor = (
            ray.remote(TrainingJobActor)
            .options(
                name=actor_name(job),
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=self._plan.cpus,
                num_gpus=self._plan.gpus,
                resources=dict(self._plan.resources),
                max_restarts=0,  # who restarts a job is decided in one place: `slipstream.training.jobs`
            )
            .remote(self._plan, job, base)
        )
        actor.run.remote()


def actor_name(job: JobRecord) -> str:
    """One name for each attempt."""
    return f"training-{job.id}-{job.attempt}"


def remove_abandoned(folder: Path) -> None:
    """Remove the folders of jobs that nobody works on any more."""
    for left in folder.glob("ftjob-*"):
        try:
            newest = max(path.stat().st_mtime for path in (left, *left.glob("*")))
        except FileNotFoundError:  # its own supervisor tidies up just now
            continue
        if time.time() - newest > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


def _find(job: JobRecord) -> Any:
    try:
        return ray.get_actor(actor_name(job), namespace=NAMESPACE)
    except ValueError:  # Ray's word for "no such actor"
        return None
