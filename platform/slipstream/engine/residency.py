"""Which adapters are where on this replica: fetch → host → device, in bounded tiers, with pins. Pure Python.

The manager decides; the engine moves bytes. Nothing here waits: a sequence whose adapter is not ON_DEVICE is simply not
scheduled yet, and everybody else goes on.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from slipstream.engine.leases import AdapterLease


class Residency(StrEnum):
    """Where an adapter is. ABSENT is also what a digest never heard of is."""

    ABSENT = "absent"
    FETCHING = "fetching"  # one download is under way, whoever else asks waits for it
    ON_HOST = "on_host"  # checked and in host memory
    ON_DEVICE = "on_device"  # in a slot; sequences may pin it
    DRAINING = "draining"  # in a slot that another adapter waits for: no new pins, evicted when the last one goes
    FAILED = "failed"  # the last fetch failed; the next request tries again


_LEGAL: Mapping[Residency, frozenset[Residency]] = {
    Residency.ABSENT: frozenset({Residency.FETCHING}),
    Residency.FETCHING: frozenset({Residency.ON_HOST, Residency.FAILED}),
    Residency.ON_HOST: frozenset({Residency.ON_DEVICE, Residency.ABSENT, Residency.FAILED}),
    Residency.ON_DEVICE: frozenset({Residency.ON_HOST, Residency.DRAINING}),
    Residency.DRAINING: frozenset({Residency.ON_HOST, Residency.ON_DEVICE}),
    Residency.FAILED: frozenset({Residency.FETCHING}),
}


@dataclass(slots=True)
class _Entry:
    state: Residency = Residency.ABSENT
    nbytes: int = 0
    num_streams: int = 0
    slot: int = -1
    pins: int = 0
    used: int = 0  # tick of the last use, for least-recently-used order
    blocked_since: int | None = None  # tick of the first unmet want of a slot; None when nobody wants it
    served: bool = False  # pinned since it got its slot
    doomed: bool = False  # to be forgotten when nobody uses it


@dataclass(slots=True)
class ResidencyPlan:
    """What the engine has to do now, in this order."""

    unload: list[tuple[str, int]] = field(default_factory=list)  # (digest, slot): free the slot
    load: list[tuple[str, int]] = field(default_factory=list)  # (digest, slot): host → device
    drop: list[str] = field(default_factory=list)  # forget host copies
    fetch: list[str] = field(default_factory=list)  # start downloads


class ResidencyManager:
    """Owner of slots, pins and the two budgets. Implements the scheduler's `AdapterSlots`."""

    def __init__(self, num_slots: int, host_bytes: int, drain_after_ticks: int = 64) -> None:
        self.num_slots = num_slots
        self.host_bytes = host_bytes
        self.drain_after_ticks = drain_after_ticks
        self._entries: dict[str, _Entry] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._tick = 0

    # -- the scheduler's side -------------------------------------------------------------------------------------

    def try_pin(self, digest: str) -> AdapterLease | None:
        """Pin for one sequence if it is ON_DEVICE."""
        entry = self._entries.get(digest)
        if entry is None or entry.state is not Residency.ON_DEVICE:
            return None
        entry.pins += 1
        entry.served = True
        entry.used = self._tick
        return AdapterLease(entry.slot, entry.num_streams)

    def unpin(self, digest: str) -> None:
        """Undo one `try_pin`."""
        entry = self._entries[digest]
        assert entry.pins > 0, "unpinned more often than pinned"
        entry.pins -= 1
        entry.used = self._tick

    # -- the engine's side ----------------------------------------------------------------------------------------

    def state(self, digest: str) -> Residency:
        """Where it is."""
        entry = self._entries.get(digest)
        return entry.state if entry else Residency.ABSENT

    def snapshot(self) -> dict[str, str]:
        """digest → state, for /metrics and routing."""
        return {digest: e.state.value for digest, e in self._entries.items() if e.state is not Residency.ABSENT}

    @property
    def num_free_slots(self) -> int:
        """Slots that no running sequence holds: empty ones, and those whose adapter is idle."""
        return self.num_slots - sum(entry.pins > 0 for entry in self._entries.values())

    def plan(self, wanted: Iterable[str]) -> ResidencyPlan:
        """One tick: serve the digests that waiting sequences want, oldest first. States move as if the plan were done."""
        self._tick += 1
        plan = ResidencyPlan()
        wanted = list(wanted)
        for digest in wanted:
            entry = self._entries.setdefault(digest, _Entry())
            entry.used = self._tick
            if entry.state in (Residency.ABSENT, Residency.FAILED):
                self._move(entry, Residency.FETCHING)
                plan.fetch.append(digest)
        self._forget_unwanted()
        self._unload_drained(plan)
        self._give_slots(wanted, plan)
        self._trim_host(plan)
        return plan

    def fetched(self, digest: str, nbytes: int, num_streams: int) -> None:
        """A download is complete and checked."""
        entry = self._entries[digest]
        self._move(entry, Residency.ON_HOST)
        entry.nbytes = nbytes
        entry.num_streams = num_streams
        entry.used = self._tick

    def failed(self, digest: str) -> None:
        """A download, or the load onto the device that `plan` asked for, did not work out."""
        entry = self._entries[digest]
        if entry.state is Residency.ON_DEVICE:
            self._leave_slot(entry)
        self._move(entry, Residency.FAILED)
        entry.blocked_since = None

    def prefetch(self, digest: str, instead_of: str) -> bool:
        """Whether to fetch an adapter that is likely to be wanted, because one that it replaces is here; FETCHING then."""
        if self.state(instead_of) not in _HELD or self.state(digest) is not Residency.ABSENT:
            return False
        entry = self._entries.setdefault(digest, _Entry(used=self._tick))
        self._move(entry, Residency.FETCHING)
        return True

    def doom(self, digest: str) -> None:
        """Forget an adapter at the end of the first tick at which nobody uses it, waits for it or fetches it."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.doomed = True

    def let_go(self, wanted: Container[str] = ()) -> ResidencyPlan:
        """What is doomed and neither in use nor waited for goes now."""
        plan = ResidencyPlan()
        for digest, entry in list(self._entries.items()):
            if entry.doomed and not entry.pins and entry.state in _HELD and digest not in wanted:
                if entry.slot >= 0:
                    plan.unload.append((digest, self._leave_slot(entry)))
                plan.drop.append(digest)
                del self._entries[digest]
        return plan

    def forget(self, digest: str) -> int | None:
        """Drop an adapter that nobody pins and that is not being fetched; returns the slot it held, for unloading."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        assert entry.state is not Residency.FETCHING, "forgetting an adapter that is on its way"
        slot = self._leave_slot(entry) if entry.slot >= 0 else None
        del self._entries[digest]
        return slot

    # -- inside ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _move(entry: _Entry, new: Residency) -> None:
        assert new in _LEGAL[entry.state], f"illegal transition {entry.state} -> {new}"
        entry.state = new

    def _leave_slot(self, entry: _Entry) -> int:
        assert entry.pins == 0, "evicting a pinned adapter"
        slot, entry.slot = entry.slot, -1
        self._move(entry, Residency.ON_HOST)
        self._free_slots.append(slot)
        return slot

    def _forget_unwanted(self) -> None:
        """What nobody waits for now has no age; a failure that nobody asks about again is not worth an entry."""
        for digest, entry in list(self._entries.items()):
            if entry.used < self._tick:
                entry.blocked_since = None
                if entry.state is Residency.FAILED:
                    del self._entries[digest]

    def _unload_drained(self, plan: ResidencyPlan) -> None:
        for digest, entry in self._entries.items():
            if entry.state is Residency.DRAINING and entry.pins == 0:
                plan.unload.append((digest, self._leave_slot(entry)))

    def _give_slots(self, wanted: list[str], plan: ResidencyPlan) -> None:
        keep = set(wanted)
        for digest in sorted(wanted, key=self._blocked_order):  # a slot goes to the one it was drained for
            entry = self._entries[digest]
            if entry.state is not Residency.ON_HOST:
                continue
            if not self._free_slots and not self._evict_idle(keep, plan):
                self._make_room_later(entry)
                continue
            entry.slot = self._free_slots.pop()
            entry.blocked_since = None
            entry.served = False
            self._move(entry, Residency.ON_DEVICE)
            plan.load.append((digest, entry.slot))

    def _blocked_order(self, digest: str) -> int:
        """Longest blocked first; sorting is stable, so the rest keep their order of arrival."""
        since = self._entries[digest].blocked_since
        return self._tick if since is None else since

    def _evict_idle(self, keep: set[str], plan: ResidencyPlan) -> bool:
        """Free the slot of the least recently used adapter that nobody pins and nobody waits for."""
        idle = [
            (e.used, d)
            for d, e in self._entries.items()
            if e.state is Residency.ON_DEVICE and not e.pins and d not in keep
        ]
        if not idle:
            return False
        _, digest = min(idle)
        plan.unload.append((digest, self._leave_slot(self._entries[digest])))
        return True

    def _make_room_later(self, entry: _Entry) -> None:
        """All slots are in use. After a bounded wait, close one to new sequences, or a hot adapter would starve this one."""
        if entry.blocked_since is None:
            entry.blocked_since = self._tick
        draining = sum(e.state is Residency.DRAINING for e in self._entries.values())
        blocked = sum(
            e.blocked_since is not None and self._tick - e.blocked_since >= self.drain_after_ticks
            for e in self._entries.values()
        )
        if draining >= blocked:
            return
        # Never one that has not been pinned yet: two blocked adapters would take the slot from each other for ever.
        on_device = [
            (e.pins, e.used, d) for d, e in self._entries.items() if e.state is Residency.ON_DEVICE and e.served
        ]
        if on_device:
            self._move(self._entries[min(on_device)[2]], Residency.DRAINING)

    def _trim_host(self, plan: ResidencyPlan) -> None:
        """Forget least recently used host copies over the budget; what is on the device or wanted now stays."""
        held = sum(e.nbytes for e in self._entries.values() if e.state in _HELD)
        idle = sorted(
            (e.used, d) for d, e in self._entries.items() if e.state is Residency.ON_HOST and e.used < self._tick
        )
        for _, digest in idle:
            if held <= self.host_bytes:
                return
            entry = self._entries.pop(digest)
            held -= entry.nbytes
            plan.drop.append(digest)

    def check_integrity(self) -> None:
        """Each slot is free or belongs to exactly one adapter; only resident adapters are pinned."""
        used = [e.slot for e in self._entries.values() if e.slot >= 0]
        assert sorted(used + self._free_slots) == list(range(self.num_slots)), "slots lost or shared"
        for entry in self._entries.values():
            in_slot = entry.state in (Residency.ON_DEVICE, Residency.DRAINING)
            assert in_slot == (entry.slot >= 0)
            assert in_slot or entry.pins == 0


_HELD = frozenset({Residency.ON_HOST, Residency.ON_DEVICE, Residency.DRAINING})
