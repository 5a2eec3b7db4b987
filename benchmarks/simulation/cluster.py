"""Replicas that share their speed among the requests in their batch, and hold adapters in slots; events in order of time.

A batch of n steps in `step_s(n)`, in which each of its requests gains a token. That is processor sharing, so a replica keeps
one clock of tokens per request, and a request ends when that clock has moved by its own tokens (no work per token).
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from slipstream.cluster.routing import Tier


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind of replica; the defaults are SmolLM2-135M in bf16 on two cores, as in README.md's tables."""

    batch: int = 64
    step_base_s: float = 0.013
    step_per_request_s: float = 0.0016
    slots: int = 32
    host: int = 200  # adapters
    fetch_s: float = 0.25  # blob store → device
    copy_s: float = 0.02  # host → device
    drain_after_s: float = 2.0  # an adapter that no slot takes for so long has one closed to new requests

    def step_s(self, running: int) -> float:
        """One step of a batch."""
        return self.step_base_s + self.step_per_request_s * running

    @property
    def tokens_per_s(self) -> float:
        """Of a full batch."""
        return self.batch / self.step_s(self.batch)


@dataclass(slots=True)
class Request:
    """tokens: of work, prompt tokens weighed. Times are in seconds."""

    at: float
    tokens: float
    adapter: str | None = None
    started: float = -1.0  # got into a batch
    ended: float = -1.0
    replica: str = ""
    hit: bool = True  # its adapter was on the device, or about to be


@dataclass(slots=True)
class Replica:
    """One engine: a batch, a queue, and adapters."""

    name: str
    machine: Machine
    running: list[tuple[float, int, Request]] = field(default_factory=list)  # heap by the clock's value at the end
    waiting: deque[Request] = field(default_factory=deque)
    clock: float = 0.0  # tokens that each request in the batch has gained
    updated: float = 0.0
    version: int = 0  # of its next end
    device: OrderedDict[str, int] = field(
        default_factory=OrderedDict
    )  # adapter → requests that use it, least recent first
    host: OrderedDict[str, None] = field(default_factory=OrderedDict)
    coming: dict[str, list[Request]] = field(default_factory=dict)
    closing: set[str] = field(default_factory=set)  # on the device, and taking no new requests
    loads: int = 0
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def queue(self) -> int:
        """Requests on it."""
        return len(self.running) + len(self.waiting) + sum(map(len, self.coming.values()))

    def tiers(self) -> dict[str, Tier]:
        """What it reports."""
        found = dict.fromkeys(self.host, Tier.ON_HOST) | dict.fromkeys(self.coming, Tier.COMING)
        return found | dict.fromkeys(self.device, Tier.ON_DEVICE)

    @property
    def has_room(self) -> bool:
        """Whether a slot is not in use."""
        return sum(count > 0 for count in self.device.values()) < self.machine.slots

    def advance(self, now: float) -> None:
        """Let the batch run until now."""
        if self.running:
            self.clock += (now - self.updated) / self.machine.step_s(len(self.running))
        self.updated = now

    def next_end(self) -> float | None:
        """When the first of the batch ends, if nothing changes."""
        if not self.running:
            return None
        return self.updated + max(0.0, self.running[0][0] - self.clock) * self.machine.step_s(len(self.running))

    def start(self, request: Request, now: float) -> None:
        """Into the batch."""
        request.started = now
        heapq.heappush(self.running, (self.clock + request.tokens, next(self._ids), request))


class Cluster:
    """All replicas and the order of events."""

    def __init__(self, machine: Machine, ended: Callable[[Request], None]) -> None:
        self.machine = machine
        self.replicas: dict[str, Replica] = {}
        self.now = 0.0
        self._ended = ended
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (when, next(self._ids), what))

    def run(self, until: float = float("inf")) -> None:
        """Play events."""
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()

    def add(self, name: str) -> Replica:
        """A replica that answers from now on."""
        self.replicas[name] = Replica(name, self.machine, updated=self.now)
        return self.replicas[name]

    def send(self, request: Request, name: str) -> None:
        """A request arrives at a replica."""
        replica = self.replicas[name]
        request.replica = name
        replica.advance(self.now)
        usable = request.adapter in replica.device and request.adapter not in replica.closing
        if request.adapter is None or usable:
            if request.adapter is not None:
                self._use(replica, request.adapter)
            self._enqueue(replica, request)
        elif request.adapter in replica.coming:
            replica.coming[request.adapter].append(request)
        else:
            self._load(replica, request, request.adapter)
        self._plan(replica)

    def _load(self, replica: Replica, request: Request, adapter: str) -> None:
        request.hit = False
        replica.loads += 1
        replica.coming[adapter] = [request]
        took = self.machine.copy_s if adapter in replica.host else self.machine.fetch_s
        since = self.now + took
        self.at(since, lambda: self._loaded(replica, adapter, since))

    def _loaded(self, replica: Replica, adapter: str, since: float) -> None:
        """The engine's own rule (`engine/residency.py`): an idle slot, or a bounded wait until one has been drained."""
        replica.advance(self.now)
        if not self._make_room(replica, adapter, since):
            self.at(self.now + 0.05, lambda: self._loaded(replica, adapter, since))
            return
        replica.host.pop(adapter, None)
        while len(replica.host) > self.machine.host:
            replica.host.popitem(last=False)
        replica.device.setdefault(adapter, 0)
        for request in replica.coming.pop(adapter):
            self._use(replica, adapter)
            self._enqueue(replica, request)
        self._plan(replica)

    def _make_room(self, replica: Replica, adapter: str, since: float) -> bool:
        device, closing = replica.device, replica.closing
        if adapter in device:  # closed while others waited: open again when nobody does
            if len(replica.coming) == 1:
                closing.discard(adapter)
            return adapter not in closing
        if len(device) < self.machine.slots:
            return True
        idle = [name for name, used in device.items() if not used]
        if idle:
            gone = next((name for name in idle if name in closing), idle[0])
            del device[gone]
            closing.discard(gone)
            replica.host[gone] = None
            return True
        if self.now - since > self.machine.drain_after_s and len(closing) < len(replica.coming):
            open_ = [(used, name) for name, used in device.items() if name not in closing]
            closing.update(name for _, name in sorted(open_)[:1])
        return False

    @staticmethod
    def _use(replica: Replica, adapter: str) -> None:
        replica.device[adapter] += 1
        replica.device.move_to_end(adapter)

    def _enqueue(self, replica: Replica, request: Request) -> None:
        if len(replica.running) < self.machine.batch:
            replica.start(request, self.now)
        else:
            replica.waiting.append(request)

    def _plan(self, replica: Replica) -> None:
        replica.version += 1
        end, version = replica.next_end(), replica.version
        if end is not None:
            self.at(end, lambda: self._end(replica, version))

    def _end(self, replica: Replica, version: int) -> None:
        if version != replica.version:
            return
        replica.advance(self.now)
        _, _, request = heapq.heappop(replica.running)
        request.ended = self.now
        if request.adapter is not None:
            replica.device[request.adapter] -= 1
        if replica.waiting:
            replica.start(replica.waiting.popleft(), self.now)
        self._plan(replica)
        self._ended(request)
