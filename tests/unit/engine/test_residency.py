"""Residency: the state machine, the two budgets, and that nobody waits for ever.

Over 400 lines: one table of steps and one state machine over it, which are read together.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slipstream.engine.leases import AdapterLease
from slipstream.engine.residency import Residency, ResidencyManager, ResidencyPlan

PLENTY = 1 << 40


def resident(manager: ResidencyManager, *digests: str, nbytes: int = 10) -> None:
    """Bring adapters onto the device, one after another."""
    for digest in digests:
        manager.plan([digest])
        manager.fetched(digest, nbytes, 3)
        manager.plan([digest])
        assert manager.state(digest) is Residency.ON_DEVICE


def on_host(manager: ResidencyManager, *digests: str, nbytes: int = 10) -> None:
    """Fetch adapters, without giving anybody a slot."""
    manager.plan(digests)
    for digest in digests:
        manager.fetched(digest, nbytes, 0)


def absent(m: ResidencyManager) -> None:
    pass


def fetching(m: ResidencyManager) -> None:
    m.plan(["a"])


def host(m: ResidencyManager) -> None:
    on_host(m, "a")


def device(m: ResidencyManager) -> None:
    resident(m, "a")


def draining(m: ResidencyManager) -> None:
    resident(m, "a")
    assert m.try_pin("a")
    on_host(m, "b")
    for _ in range(1 + m.drain_after_ticks):
        m.plan(["b"])
    assert m.state("a") is Residency.DRAINING


def drained(m: ResidencyManager) -> None:
    draining(m)
    m.unpin("a")


def failed(m: ResidencyManager) -> None:
    m.plan(["a"])
    m.failed("a")


def want(m: ResidencyManager) -> None:
    m.plan(["a"])


def tick(m: ResidencyManager) -> None:
    m.plan([])


def arrive(m: ResidencyManager) -> None:
    m.fetched("a", 10, 3)


def fail(m: ResidencyManager) -> None:
    m.failed("a")


def want_other(m: ResidencyManager) -> None:
    on_host(m, "b")
    m.plan(["b"])


def pressure(m: ResidencyManager) -> None:
    m.host_bytes = 0
    m.plan([])


R = Residency
Move = Callable[[ResidencyManager], None]


@pytest.mark.parametrize(
    ("before", "event", "after"),
    [
        (absent, tick, R.ABSENT),
        (absent, want, R.FETCHING),
        (fetching, want, R.FETCHING),
        (fetching, tick, R.FETCHING),
        (fetching, pressure, R.FETCHING),
        (fetching, arrive, R.ON_HOST),
        (fetching, fail, R.FAILED),
        (host, tick, R.ON_HOST),
        (host, want, R.ON_DEVICE),
        (host, pressure, R.ABSENT),
        (host, fail, R.FAILED),
        (device, tick, R.ON_DEVICE),
        (device, want, R.ON_DEVICE),
        (device, pressure, R.ON_DEVICE),
        (device, want_other, R.ON_HOST),
        (device, fail, R.FAILED),
        (draining, tick, R.DRAINING),
        (draining, want, R.DRAINING),
        (draining, pressure, R.DRAINING),
        (drained, tick, R.ON_HOST),
        (drained, want, R.ON_DEVICE),  # nobody else wants the slot any more
        (failed, tick, R.ABSENT),  # nobody asks about it any more
        (failed, want, R.FETCHING),
    ],
)
def test_each_state_answers_each_event(before: Move, event: Move, after: Residency) -> None:
    manager = ResidencyManager(1, PLENTY, drain_after_ticks=3)
    before(manager)
    event(manager)
    assert manager.state("a") is after
    assert manager.snapshot().get("a", "absent") == after.value
    manager.check_integrity()


@pytest.mark.parametrize(("before", "event"), [(host, arrive), (failed, arrive), (failed, fail), (draining, fail)])
def test_what_cannot_happen_is_our_bug(before: Move, event: Move) -> None:
    manager = ResidencyManager(1, PLENTY, drain_after_ticks=3)
    before(manager)
    with pytest.raises(AssertionError, match="illegal transition"):
        event(manager)


@pytest.mark.parametrize("before", [absent, fetching, host, draining, failed])
def test_only_adapters_on_the_device_can_be_pinned(before: Move) -> None:
    manager = ResidencyManager(1, PLENTY, drain_after_ticks=3)
    before(manager)
    assert manager.try_pin("a") is None


def test_a_lease_carries_slot_and_streams_and_pins_are_counted() -> None:
    manager = ResidencyManager(2, PLENTY)
    resident(manager, "a")
    plan_slot = manager.try_pin("a")
    assert isinstance(plan_slot, AdapterLease)
    assert plan_slot.num_streams == 3
    assert plan_slot == manager.try_pin("a")
    manager.unpin("a")
    manager.unpin("a")
    with pytest.raises(AssertionError, match="more often"):
        manager.unpin("a")


def test_one_fetch_however_many_ask() -> None:
    manager = ResidencyManager(2, PLENTY)
    assert manager.plan(["a", "b"]).fetch == ["a", "b"]
    for _ in range(5):
        assert manager.plan(["b", "a"]).fetch == []
    manager.fetched("a", 1, 0)
    assert manager.plan(["a"]).fetch == []


def test_a_failed_fetch_is_tried_again_once_per_request() -> None:
    manager = ResidencyManager(1, PLENTY)
    assert manager.plan(["a"]).fetch == ["a"]
    manager.failed("a")
    assert manager.plan([]).fetch == []
    assert manager.plan(["a"]).fetch == ["a"]
    manager.fetched("a", 1, 0)
    assert manager.plan(["a"]).load == [("a", 0)]


def test_a_failed_load_gives_its_slot_back() -> None:
    manager = ResidencyManager(1, PLENTY)
    resident(manager, "a")
    manager.failed("a")
    manager.check_integrity()
    resident(manager, "b")


def test_the_least_recently_used_slot_goes_first() -> None:
    manager = ResidencyManager(3, PLENTY)
    resident(manager, "a", "b", "c")
    manager.plan(["a"])
    on_host(manager, "d")
    plan = manager.plan(["d"])
    assert [d for d, _ in plan.unload] == ["b"]
    assert [d for d, _ in plan.load] == ["d"]
    assert plan.unload[0][1] == plan.load[0][1]


def test_the_end_of_a_pin_is_a_use() -> None:
    manager = ResidencyManager(2, PLENTY)
    resident(manager, "a", "b")
    manager.try_pin("a")
    manager.plan(["b"])
    manager.plan([])
    manager.unpin("a")
    on_host(manager, "c")
    assert [d for d, _ in manager.plan(["c"]).unload] == ["b"]


def test_pinned_or_wanted_adapters_are_not_evicted() -> None:
    manager = ResidencyManager(2, PLENTY, drain_after_ticks=50)
    resident(manager, "a", "b")
    manager.try_pin("a")
    on_host(manager, "c")
    plan = manager.plan(["b", "c"])
    assert plan == ResidencyPlan()
    plan = manager.plan(["c"])
    assert [d for d, _ in plan.unload] == ["b"]


def test_host_copies_over_the_budget_go_oldest_first() -> None:
    manager = ResidencyManager(1, 25)
    resident(manager, "a", "b", "c")  # 30 bytes: "a" has been forgotten while "c" was wanted
    assert manager.snapshot() == {"b": "on_host", "c": "on_device"}
    on_host(manager, "d", nbytes=5)
    assert manager.plan([]).drop == []  # 25 bytes are exactly the budget
    on_host(manager, "e", nbytes=1)
    assert manager.plan([]).drop == ["b"]


def test_what_is_wanted_or_on_the_device_may_exceed_the_host_budget() -> None:
    manager = ResidencyManager(1, 5)
    resident(manager, "a")
    manager.try_pin("a")
    on_host(manager, "b")
    assert manager.plan(["b"]).drop == []
    assert manager.plan([]).drop == ["b"]
    assert manager.state("a") is Residency.ON_DEVICE


def test_what_was_just_evicted_can_be_dropped_in_the_same_tick() -> None:
    manager = ResidencyManager(1, 10)
    resident(manager, "a")
    on_host(manager, "b")
    plan = manager.plan(["b"])
    assert (plan.unload, plan.load, plan.drop) == ([("a", 0)], [("b", 0)], ["a"])


# -- fairness ---------------------------------------------------------------------------------------------------------


class Traffic:
    """Waiting sequences in order, each holding its adapter for some ticks; admission as the scheduler does it."""

    def __init__(self, manager: ResidencyManager) -> None:
        self.manager = manager
        self.now = 0
        self.waiting: list[tuple[str, int]] = []  # adapter, ticks to run
        self.running: list[tuple[str, int]] = []  # adapter, tick of its end
        self.first_run: dict[str, int] = {}

    def ask(self, digest: str, ticks: int, front: bool = False) -> None:
        self.waiting.insert(0 if front else len(self.waiting), (digest, ticks))

    def tick(self) -> ResidencyPlan:
        self.now += 1
        plan = self.manager.plan(list(dict.fromkeys(d for d, _ in self.waiting)))
        for digest in plan.fetch:
            self.manager.fetched(digest, 1, 0)
        for item in list(self.waiting):
            digest, ticks = item
            if self.manager.try_pin(digest) is not None:
                self.waiting.remove(item)
                self.running.append((digest, self.now + ticks))
                self.first_run.setdefault(digest, self.now)
        for item in [r for r in self.running if r[1] <= self.now]:
            self.running.remove(item)
            self.manager.unpin(item[0])
        self.manager.check_integrity()
        return plan


@pytest.mark.parametrize("ticks", [1, 2, 7])
def test_a_hot_adapter_gives_way_in_bounded_ticks(ticks: int) -> None:
    """Its requests overlap, so that it is never idle."""
    traffic = Traffic(ResidencyManager(1, PLENTY, drain_after_ticks=10))
    for now in range(80):
        traffic.ask("hot", ticks)
        if now == 5:
            traffic.ask("cold", 1)
        traffic.tick()
    assert 15 <= traffic.first_run["cold"] <= 5 + 10 + ticks + 4
    assert traffic.running, "the hot adapter came back"


def test_preempted_sequences_in_front_do_not_take_the_slot_that_was_drained_for_another() -> None:
    traffic = Traffic(ResidencyManager(1, PLENTY, drain_after_ticks=5))
    traffic.ask("hot", 20)
    traffic.tick()
    traffic.tick()
    traffic.ask("cold", 1)
    for _ in range(60):
        traffic.tick()
        traffic.ask("hot", 1, front=True)
    assert traffic.first_run["cold"] <= 30


@pytest.mark.parametrize(("slots", "adapters"), [(1, 3), (1, 6), (2, 5), (3, 9)])
def test_many_blocked_adapters_are_all_served(slots: int, adapters: int) -> None:
    """More of them than slots, all beyond the bounded wait: they must not take slots from each other unused."""
    traffic = Traffic(ResidencyManager(slots, PLENTY, drain_after_ticks=4))
    names = [f"a{i}" for i in range(adapters)]
    for name in names:
        traffic.ask(name, 12)
    loads = 0
    for _ in range(14 * adapters + 20):
        loads += len(traffic.tick().load)
    assert sorted(traffic.first_run) == names
    assert list(traffic.first_run) == names, "first come, first served"
    assert loads == adapters


def test_a_wait_that_was_given_up_counts_for_nothing() -> None:
    manager = ResidencyManager(1, PLENTY, drain_after_ticks=5)
    resident(manager, "hot")
    manager.try_pin("hot")
    on_host(manager, "gone", "new")
    manager.plan(["gone"])
    for _ in range(10):
        manager.plan([])
    manager.plan(["new"])
    assert manager.state("hot") is Residency.ON_DEVICE
    for _ in range(5):
        manager.plan(["new"])
    assert manager.state("hot") is Residency.DRAINING


def test_only_as_many_adapters_drain_as_are_blocked() -> None:
    manager = ResidencyManager(3, PLENTY, drain_after_ticks=2)
    resident(manager, "a", "b", "c")
    for digest in "aabc":
        manager.try_pin(digest)
    on_host(manager, "x")
    for _ in range(20):
        manager.plan(["x"])
    assert sorted(manager.snapshot().values()) == ["draining", "on_device", "on_device", "on_host"]
    assert manager.state("a") is Residency.ON_DEVICE, "the one with the most pins stays"


# -- told beforehand --------------------------------------------------------------------------------------------------


def test_what_takes_over_is_fetched_where_the_other_is() -> None:
    m = ResidencyManager(2, PLENTY)
    resident(m, "old")
    assert m.prefetch("new", "old")
    assert not m.prefetch("new", "old"), "once"
    assert not m.prefetch("third", "elsewhere")
    assert m.plan(["new"]).fetch == [], "it is on its way"
    m.fetched("new", 10, 0)
    assert [digest for digest, _ in m.plan(["new"]).load] == ["new"]


def test_a_prefetch_that_fails_is_no_obstacle() -> None:
    m = ResidencyManager(2, PLENTY)
    resident(m, "old")
    m.prefetch("new", "old")
    m.failed("new")
    assert m.plan(["new"]).fetch == ["new"]


def test_what_is_gone_goes_when_nobody_uses_it() -> None:
    m = ResidencyManager(2, PLENTY)
    resident(m, "a")
    lease = m.try_pin("a")
    assert lease is not None
    m.doom("a")
    assert m.let_go().drop == []
    m.unpin("a")
    plan = m.let_go()
    assert (plan.unload, plan.drop) == ([("a", lease.slot)], ["a"])
    assert m.state("a") is Residency.ABSENT
    m.doom("never heard of")
    on_host(m, "b")
    m.doom("b")
    assert m.let_go({"b"}).drop == [], "being waited for saves it"
    assert m.let_go().drop == ["b"]


# -- any order of calls -----------------------------------------------------------------------------------------------

DIGESTS = st.sampled_from("abcde")


class ResidencyMachine(RuleBasedStateMachine):
    """Mirrors what an engine would hold if it did what the plans say."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = ResidencyManager(2, 25, drain_after_ticks=2)
        self.pins: dict[str, int] = {}
        self.fetching: set[str] = set()
        self.host: dict[str, int] = {}
        self.slots: dict[int, str] = {}

    @rule(wanted=st.lists(DIGESTS, unique=True))
    def plan(self, wanted: list[str]) -> None:
        plan = self.manager.plan(wanted)
        for digest, slot in plan.unload:
            assert not self.pins.get(digest), "a pinned adapter was evicted"
            assert self.slots.pop(slot) == digest
        for digest, slot in plan.load:
            assert slot not in self.slots
            assert digest in self.host
            assert digest in wanted
            self.slots[slot] = digest
        for digest in plan.drop:
            assert digest not in self.slots.values()
            assert digest not in wanted
            del self.host[digest]
        for digest in plan.fetch:
            assert digest not in self.fetching
            assert digest not in self.host
            self.fetching.add(digest)
        needed = {*wanted, *self.slots.values()}
        spare = sum(size for digest, size in self.host.items() if digest not in needed)
        assert sum(self.host.values()) <= 25 or spare == 0, "over the budget for nothing"
        free = 2 - len(self.slots)
        assert not free or not [d for d in wanted if d in self.host and d not in self.slots.values()]

    @rule(digest=DIGESTS, like=DIGESTS)
    def prefetch(self, digest: str, like: str) -> None:
        expected = like in self.host and self.manager.state(digest) is Residency.ABSENT
        assert self.manager.prefetch(digest, like) == expected
        if expected:
            self.fetching.add(digest)

    @rule(digest=DIGESTS)
    def doom(self, digest: str) -> None:
        self.manager.doom(digest)

    @rule()
    def let_go(self) -> None:
        plan = self.manager.let_go()
        for gone, slot in plan.unload:
            assert not self.pins.get(gone)
            assert self.slots.pop(slot) == gone
        for gone in plan.drop:
            assert gone not in self.slots.values()
            del self.host[gone]

    @rule(digest=DIGESTS)
    def pin(self, digest: str) -> None:
        lease = self.manager.try_pin(digest)
        resident_now = digest in self.slots.values() and self.manager.state(digest) is not Residency.DRAINING
        assert (lease is not None) == resident_now
        if lease is not None:
            assert self.slots[lease.slot] == digest
            self.pins[digest] = self.pins.get(digest, 0) + 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(d for d, n in self.pins.items() if n)))
        self.manager.unpin(digest)
        self.pins[digest] -= 1

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), size=st.integers(1, 20), works=st.booleans())
    def fetched(self, data: st.DataObject, size: int, works: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.fetching)))
        self.fetching.remove(digest)
        if works:
            self.manager.fetched(digest, size, 0)
            self.host[digest] = size
        else:
            self.manager.failed(digest)

    @invariant()
    def whole(self) -> None:
        self.manager.check_integrity()
        for digest, state in self.manager.snapshot().items():
            assert (state == "fetching") == (digest in self.fetching)
            assert (state in ("on_device", "draining")) == (digest in self.slots.values())
            assert (state in ("on_host", "on_device", "draining")) == (digest in self.host)

    def teardown(self) -> None:
        """Whatever happened before: once the pins go, everybody who waits is served."""
        for digest, count in self.pins.items():
            for _ in range(count):
                self.manager.unpin(digest)
        waiting = list("abcde")
        for _ in range(40):
            plan = self.manager.plan(waiting)
            for digest in [*plan.fetch, *self.fetching]:
                self.manager.fetched(digest, 1, 0)
            self.fetching.clear()
            for digest in list(waiting):
                if self.manager.try_pin(digest) is not None:
                    self.manager.unpin(digest)
                    waiting.remove(digest)
        assert not waiting


ResidencyMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnyOrderOfCalls = ResidencyMachine.TestCase
