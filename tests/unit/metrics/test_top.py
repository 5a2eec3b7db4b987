"""Labels are bounded, and no series that is shown ever falls, whatever comes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from slipstream.metrics.bounded import BoundedCounter
from slipstream.metrics.top import OTHER, TRACKED, TopLabels, short_digest
from slipstream.testing import ManualClock

VALUES = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", OTHER])
EVENTS = st.lists(st.one_of(VALUES, st.floats(0.0, 500.0)), max_size=200)  # a use, or time that passes
LIMIT = 3


class World:
    """A counter by tenant, of which every use counts one."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.clock = ManualClock(0.0)
        self.top = TopLabels(limit, self.clock, swap_every_s=60.0)
        self.registry = CollectorRegistry()
        self.counter = BoundedCounter("tenant_requests_total", "tenant", self.top, self.registry)
        self.forgotten: list[tuple[float, str]] = []
        self.top.on_forget(lambda label: self.forgotten.append((self.clock(), label)))

    def use(self, value: str) -> None:
        self.top.note(value)
        self.counter.inc(value, "ok")

    def shown(self) -> dict[str, float]:
        (family,) = self.registry.collect()
        return {sample.labels["tenant"]: sample.value for sample in family.samples}


@given(EVENTS)
def test_names_are_bounded_and_what_is_shown_never_falls(events: list[str | float]) -> None:
    world, used, lost = World(), 0, 0.0
    before: dict[str, float] = {}
    for event in events:
        if isinstance(event, float):
            world.clock.advance(event)
            continue
        count = len(world.forgotten)
        kept = before
        world.use(event)
        used += 1
        gone = [label for _, label in world.forgotten[count:]]
        lost += sum(kept.get(label, 0.0) for label in gone)
        shown = world.shown()
        assert len(shown) <= LIMIT + 1
        for label, value in before.items():
            if label in gone:
                assert label not in shown, "what is given up goes with its count"
            else:
                assert shown[label] >= value
        assert sum(shown.values()) + lost == used, "nothing is counted twice or not at all"
        before = shown


@given(EVENTS)
def test_names_change_hands_once_a_minute_at_most(events: list[str | float]) -> None:
    world = World()
    for event in events:
        if isinstance(event, float):
            world.clock.advance(event)
        else:
            world.use(event)
    times = [at for at, _ in world.forgotten]
    assert all(later - earlier >= 60.0 for earlier, later in pairwise(times))


def test_while_there_is_room_everybody_has_a_name() -> None:
    world = World()
    for value in ("a", "b", "c", "d"):
        world.use(value)
    assert world.shown() == {"a": 1, "b": 1, "c": 1, OTHER: 1}


def test_a_newcomer_that_is_busy_takes_the_place_of_the_one_that_is_least() -> None:
    world = World()
    for value in ["a"] * 50 + ["b"] * 40 + ["c"] * 5:
        world.use(value)
    world.clock.advance(61.0)
    for _ in range(30):
        world.use("new")
    assert set(world.shown()) == {"a", "b", "new", OTHER}
    assert [label for _, label in world.forgotten] == ["c"]
    for _ in range(100):
        world.use("c")
    assert "c" not in world.shown(), "not again within the minute"


def test_one_that_is_asked_for_no_more_gives_way_in_the_end() -> None:
    world = World(limit=1)
    for _ in range(1000):
        world.use("old")
    world.clock.advance(6 * 3600.0)
    world.use("new")
    assert set(world.shown()) == {"new"}


def test_a_tenant_that_is_called_other_is_among_the_others() -> None:
    world = World()
    for value in (OTHER, "a", OTHER):
        world.use(value)
    assert world.shown() == {OTHER: 2, "a": 1}
    assert dict(world.top.named()) == {"a": "a"}


def test_memory_is_bounded_and_the_busy_one_is_found_in_a_crowd() -> None:
    world = World()
    for number in range(3000):
        world.use(f"crowd-{number}")
        if number % 5 == 0:
            world.use("busy")
        world.clock.advance(1.0)
    assert "busy" in dict(world.top.named())
    assert len(world.top._scores) <= TRACKED * LIMIT
    assert Counter(world.shown())["busy"] > 100


def test_digests_are_short() -> None:
    assert short_digest("sha256:" + "0123456789abcdef" * 4) == "0123456789ab"
