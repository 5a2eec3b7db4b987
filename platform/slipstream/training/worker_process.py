"""The trainer's process as its supervisor sees it: started, watched, stopped; and the lines that it writes."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from slipstream.process_env import child_environment

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # here: a forked child must not load libraries
_POLL_S = 0.05


class WorkerProcess:
    """A child in a process group of its own; on Linux it dies with its supervisor, whatever ends that."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Start it; what it prints goes to the end of `log`.

        Not asyncio's own: its way of noticing the end depends on which loop runs in which thread, and a supervisor does
        not choose its loop. Call it in a thread that lives as long as the supervisor: the kernel watches that thread.
        """
        with log.open("ab", buffering=0) as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child_environment({"PYTHONUNBUFFERED": "1"}),
                start_new_session=True,
                preexec_fn=partial(_die_with, os.getpid()) if _LIBC is not None else None,  # noqa: PLW1509
            )
        self._killer: asyncio.TimerHandle | None = None

    async def wait(self, timeout_s: float) -> int | None:
        """Its exit status (negative for a signal), or None when it still runs after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        # Asked again and again: a thread that waits could not be told to stop.
        while (status := self._process.poll()) is None and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(min(_POLL_S, timeout_s))
        return status

    def stop(self, grace_s: float) -> None:
        """Ask it to save and end; after `grace_s` it is killed."""
        self._signal(signal.SIGTERM)
        self._killer = asyncio.get_running_loop().call_later(grace_s, self._signal, signal.SIGKILL)

    async def kill(self) -> None:
        """End it and whatever it started, and wait until it is gone. Nothing happens when it is."""
        if self._killer is not None:
            self._killer.cancel()
        self._signal(signal.SIGKILL)
        await self.wait(float("inf"))

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class EventTail:
    """New lines of a file that another process appends JSON objects to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> list[dict[str, Any]]:
        """What was added since the last call, whole lines only; a line that is no JSON object is left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        return [event for line in whole.splitlines() if isinstance(event := _parsed(line), dict)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _die_with(parent: int) -> None:
    """In the child before exec: two workers must never write to one job's folder, so none outlives its supervisor."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
