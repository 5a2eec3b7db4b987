"""One engine, several processes: rank 0 schedules and tells the others what to run; they follow.

Everything that changes a rank goes through one ordered line of commands (`Run`, `Load`, `Unload`, `Forget`), so that all
ranks run the same steps on the same adapters. Adapters themselves travel beside it and are laid out while steps go on. Who
starts the processes and looks after them is no business of this file (`deployments` does, with Ray). A rank that fails ends
its process: the others see its line close, or their collective fail, and end as well.
"""

from __future__ import annotations

import itertools
import pickle
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
from torch import distributed

from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.parallel.group import TorchGroup
from slipstream.engine.plan import StepPlan, StepResult
from slipstream.engine.runner import ModelRunner, PreparedAdapter
from slipstream.errors import EngineFailed

_STORE: Any = distributed.TCPStore  # type: ignore[attr-defined]
MEET_TIMEOUT_S = 300.0  # all ranks load their parts at the same time; this is for their processes to start


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where ranks find each other; plain data, so that it travels to any node."""

    host: str  # address of rank 0's machine
    store_port: int
    line_port: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class Run:
    """Compute one step."""

    plan: StepPlan


@dataclass(frozen=True, slots=True)
class Load:
    """Put the prepared adapter `key` into a slot."""

    slot: int
    key: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Empty a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop prepared adapters from host memory."""

    keys: tuple[int, ...]


Command = Run | Load | Unload | Forget


@dataclass(frozen=True, slots=True, weakref_slot=True)
class RankedAdapter:
    """An adapter that all ranks have laid out, each its own part."""

    key: int
    own: PreparedAdapter

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part; the others' are about as many."""
        return self.own.nbytes

    @property
    def num_streams(self) -> int:
        """K."""
        return self.own.num_streams


class Lead:
    """Rank 0's end: opens the meeting, and tells the others what to do."""

    def __init__(self, host: str, size: int) -> None:
        """Listens on `host`, an address of this machine that the other ranks reach."""
        self.size = size
        self._host = host
        secret = secrets.token_bytes(32)
        self._listener = Listener((host, 0), backlog=2 * size, authkey=secret)
        limit = timedelta(seconds=MEET_TIMEOUT_S)
        self._store = _STORE(host, 0, size, is_master=True, wait_for_workers=False, timeout=limit)
        self.meeting = Meeting(host, self._store.port, self._listener.address[1], secret)
        self._lines: list[Connection[Any, Any]] = []
        self._sides: list[Connection[Any, Any]] = []
        self._side_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=max(1, size - 1), thread_name_prefix="slipstream-rank")

    def meet(self, device: torch.device) -> TorchGroup:
        """Wait until all ranks are there. Raises `EngineFailed` when one does not come."""
        try:
            group = TorchGroup.join(self._store, device, 0, self.size, self._host)
            found: dict[tuple[str, int], Connection[Any, Any]] = {}
            while len(found) < 2 * (self.size - 1):
                line = self._listener.accept()
                found[_hear(line)] = line
        except (RuntimeError, OSError, EOFError) as error:
            raise EngineFailed("A rank of this tensor-parallel replica did not start.") from error
        ranks = range(1, self.size)
        self._lines = [found["line", rank] for rank in ranks]
        self._sides = [found["side", rank] for rank in ranks]
        return group

    def tell(self, command: Command) -> None:
        """Have every other rank do something, after all it was told before. Raises `EngineFailed` when one is gone."""
        message = pickle.dumps(command, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            for line in self._lines:
                line.send_bytes(message)
        except OSError as error:
            raise EngineFailed("A rank of this tensor-parallel replica is gone.") from error

    def prepare(self, key: int, weights: AdapterWeights, own: Callable[[], PreparedAdapter]) -> RankedAdapter:
        """Have all ranks lay an adapter out, this one too. Any thread. Raises what any of them raised."""
        message = pickle.dumps((key, weights), protocol=pickle.HIGHEST_PROTOCOL)
        with self._side_lock:
            asked = [self._pool.submit(_ask, side, message) for side in self._sides]
            try:
                mine = own()
            finally:
                answers = [answer.result() for answer in asked]  # all of them, or the next adapter would get these
        for error in answers:
            if error is not None:
                raise error
        return RankedAdapter(key, mine)

    def close(self) -> None:
        """Hang up: the other ranks end."""
        for line in (*self._lines, *self._sides):
            line.close()
        self._listener.close()
        self._pool.shutdown(wait=False)


def _hear(line: Connection[Any, Any]) -> Any:
    """The next message. Plain pickles, not the ones of `multiprocessing`, which share memory and so one machine."""
    return pickle.loads(line.recv_bytes())  # noqa: S301 - both ends have shown that they know the secret


def _ask(side: Connection[Any, Any], message: bytes) -> Exception | None:
    try:
        side.send_bytes(message)
        answer: Exception | None = _hear(side)
    except (OSError, EOFError) as error:
        raise EngineFailed("A rank of this tensor-parallel replica is gone.") from error
    return answer


class LeadRunner:
    """A `Runner` whose work all ranks share. Owned by rank 0's step thread; `prepare_adapter` by any."""

    def __init__(self, own: ModelRunner, lead: Lead) -> None:
        self._own, self._lead = own, lead
        self._keys = itertools.count(1)
        self._dropped: deque[int] = deque()  # keys that nobody here holds any more

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        if self._dropped:
            self._lead.tell(Forget(tuple(self._dropped.popleft() for _ in range(len(self._dropped)))))
        self._lead.tell(Run(plan))
        return self._own.run(plan)

    def prepare_adapter(self, weights: AdapterWeights) -> RankedAdapter:
        """Lay an adapter out on every rank. Raises `ValueError` when it does not fit."""
        key = next(self._keys)
        try:
            adapter = self._lead.prepare(key, weights, lambda: self._own.prepare_adapter(weights))
        except Exception:
            self._dropped.append(key)  # other ranks may have it
            raise
        weakref.finalize(adapter, self._dropped.append, key)
        return adapter

    def load_adapter(self, slot: int, adapter: RankedAdapter) -> None:
        """Host → device on every rank. When it raises, the slot is still free."""
        self._lead.tell(Load(slot, adapter.key))
        self._own.load_adapter(slot, adapter.own)

    def unload_adapter(self, slot: int) -> None:
        """Free a slot on every rank."""
        self._lead.tell(Unload(slot))
        self._own.unload_adapter(slot)


class Follower:
    """A rank from 1 on: does what rank 0 says, until it hangs up."""

    def __init__(self, meeting: Meeting, rank: int, size: int, host: str) -> None:
        """`host`: an address of this rank's machine."""
        self._meeting, self._rank, self._size, self._host = meeting, rank, size, host
        self._adapters: dict[int, PreparedAdapter] = {}

    def meet(self, device: torch.device) -> TorchGroup:
        """Wait until all ranks are there."""
        meeting, limit = self._meeting, timedelta(seconds=MEET_TIMEOUT_S)
        store = _STORE(meeting.host, meeting.store_port, self._size, is_master=False, timeout=limit)
        group = TorchGroup.join(store, device, self._rank, self._size, self._host)
        self._line, self._side = self._connect("line"), self._connect("side")
        return group

    def _connect(self, kind: str) -> Connection[Any, Any]:
        line = Client((self._meeting.host, self._meeting.line_port), authkey=self._meeting.secret)
        line.send_bytes(pickle.dumps((kind, self._rank)))
        return line

    def follow(self, runner: ModelRunner) -> None:
        """Returns when rank 0 has hung up. Raises what a step raised: the process is then of no more use."""
        threading.Thread(target=self._prepare_all, args=(runner,), name="slipstream-adapter", daemon=True).start()
        while True:
            try:
                command: Command = _hear(self._line)
            except (EOFError, OSError):
                return
            self._do(runner, command)

    def _do(self, runner: ModelRunner, command: Command) -> None:
        match command:
            case Run(plan):
                runner.run(plan)
            case Load(slot, key):
                with suppress(RuntimeError, MemoryError):  # no room somewhere: rank 0 hears of it as well
                    runner.load_adapter(slot, self._adapters[key])
            case Unload(slot):
                runner.unload_adapter(slot)
            case Forget(keys):
                for key in keys:
                    self._adapters.pop(key, None)

    def _prepare_all(self, runner: ModelRunner) -> None:
        """Lay out what rank 0 sends, beside the steps."""
        with suppress(EOFError, OSError):
            while True:
                key, weights = _hear(self._side)
                failure: Exception | None = None
                try:
                    self._adapters[key] = runner.prepare_adapter(weights)
                except (ValueError, KeyError, RuntimeError, MemoryError) as error:
                    failure = error
                self._side.send_bytes(pickle.dumps(failure))
