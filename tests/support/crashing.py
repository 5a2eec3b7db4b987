"""Processes that die, or whose Redis dies, at one chosen step of what they do: every step can be chosen.

A step is a command or script sent to Redis, a blob written or removed, or a file of a backup. `Fault(3, "before")` strikes
when the third is about to happen, `"after"` when it has, before its answer is looked at.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import pytest

from adapter_registry.backup.place import BackupPlace
from adapter_registry.blobs import ObstoreBlobs
from adapter_registry.errors import RegistryError
from adapter_registry.redis_connection import RedisConnection
from adapter_registry.redis_imports import RedisImports
from adapter_registry.redis_store import RedisStore

_STEPS = (
    (RedisConnection, "_command"), (RedisConnection, "_script"), (ObstoreBlobs, "_put"), (ObstoreBlobs, "delete"),
    (BackupPlace, "put"),
)  # fmt: skip
DIED = -signal.SIGKILL
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Fault:
    """Where it strikes, and whom: this process, or the one with this id."""

    step: int
    when: Literal["before", "after"]
    victim: int | None = None


@dataclass
class World:
    """What an act works on, in the process that may die."""

    store: RedisStore
    imports: RedisImports
    blobs: ObstoreBlobs
    folder: Path


Act = Callable[[World], Awaitable[object]]


@dataclass(frozen=True)
class Ending:
    """How an act ended: steps that it took, and what it returned, unless it died."""

    died: bool
    steps: int = 0
    answer: object = None
    error: str = ""


def perform(act: Act, redis_url: str, blob_url: str, folder: Path, fault: Fault | None = None) -> Ending:
    """Do it in a process of its own."""
    _start_zygote()
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(act, redis_url, blob_url, folder, fault, sender))
    process.start()
    sender.close()
    try:
        ending = receiver.recv() if receiver.poll(60) else None
    except EOFError:
        ending = None
    process.join(30)
    receiver.close()
    if ending is None:
        assert process.exitcode == DIED, process.exitcode
        return Ending(died=True)
    assert isinstance(ending, Ending)
    return ending


@cache
def _start_zygote() -> None:
    """The process that all are forked from: it has imported everything, and runs no thread."""
    forkserver.set_forkserver_preload(["support.crashing", "support.acts"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it would look for them nowhere else
        forkserver.ensure_running()


def _run(act: Act, redis_url: str, blob_url: str, folder: Path, fault: Fault | None, sender: Any) -> None:
    count = _strike_at(fault)

    async def work() -> Ending:
        store = RedisStore.from_url(redis_url, retries=0, timeout_s=1)
        imports = RedisImports.from_url(redis_url, retries=0, timeout_s=1)
        try:
            answer = await act(World(store, imports, ObstoreBlobs.from_url(blob_url), folder))
            return Ending(False, count(), answer)
        except RegistryError as error:
            return Ending(False, count(), None, f"{type(error).__name__}: {error}")
        finally:
            await store.close()
            await imports.close()

    sender.send(asyncio.run(work()))
    sender.close()


def _strike_at(fault: Fault | None) -> Callable[[], int]:
    """Count steps, and strike at one."""
    steps = 0

    def strike(when: str) -> None:
        if fault is not None and (fault.step, fault.when) == (steps, when):
            os.kill(fault.victim or os.getpid(), signal.SIGKILL)

    def wrap(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def stepped(self: Any, *args: Any) -> Any:
            nonlocal steps
            steps += 1
            mine = steps
            strike("before")
            answer = await original(self, *args)
            if mine == steps:
                strike("after")
            return answer

        return stepped

    for owner, name in _STEPS:
        setattr(owner, name, wrap(getattr(owner, name)))
    return lambda: steps
