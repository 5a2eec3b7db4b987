"""The routing policy: filters, places, spreading, hysteresis, and that a stale report is only a hint."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.cluster.routing import AdapterRouting, ReplicaView, RouteKey, RoutingOptions, Tier

ADAPTER = RouteKey("adapter")


def routing(*views: ReplicaView, **options: float) -> AdapterRouting:
    policy = AdapterRouting(RoutingOptions(**options), random.Random(0))  # type: ignore[arg-type]
    policy.update(views)
    return policy


def replicas(count: int) -> list[ReplicaView]:
    return [ReplicaView(f"r{i}") for i in range(count)]


def pick(policy: AdapterRouting, key: RouteKey, queues: Counter[str], now: float = 0.0) -> str:
    """As Serve does: the shortest queue of the first group."""
    chosen = min(policy.rank(key, queues.__getitem__, now)[0], key=queues.__getitem__)
    policy.routed(key, chosen, now)
    return chosen


def test_a_cold_adapter_is_loaded_once() -> None:
    policy, idle = routing(*replicas(8)), Counter[str]()
    assert len({pick(policy, ADAPTER, idle, now=i * 0.1) for i in range(100)}) == 1


def test_all_gateways_place_a_cold_adapter_alike() -> None:
    idle = Counter[str]()
    for i in range(20):
        key = RouteKey(f"adapter-{i}")
        assert len({pick(routing(*replicas(16)), key, idle) for _ in range(4)}) == 1


def test_cold_adapters_stay_put_when_replicas_come_and_go() -> None:
    idle, keys = Counter[str](), [RouteKey(f"a{i}") for i in range(200)]
    policy = routing(*replicas(10))
    before = {key: pick(policy, key, idle) for key in keys}
    policy.update(replicas(9))
    moved = [key for key in keys if pick(policy, key, idle, now=100.0) != before[key]]
    assert all(before[key] == "r9" for key in moved)
    policy.update(replicas(10))
    assert sum(pick(policy, key, idle, now=200.0) != before[key] for key in keys) == 0


def test_the_replica_that_holds_an_adapter_is_preferred() -> None:
    home = pick(routing(*replicas(4)), ADAPTER, Counter())
    holder = next(name for name in ("r0", "r1") if name != home)
    views = [ReplicaView(v.name, {"adapter": Tier.ON_DEVICE} if v.name == holder else {}) for v in replicas(4)]
    assert pick(routing(*views), ADAPTER, Counter()) == holder


def test_a_hot_adapter_spreads_and_settles_again() -> None:
    policy, queues = routing(*replicas(8), settle_s=30.0), Counter[str]()
    for i in range(160):  # nothing ends: the queues only grow
        queues[pick(policy, ADAPTER, queues, now=i * 0.1)] += 1
    wide = policy.width("adapter")
    assert wide >= 4
    assert max(queues.values()) - min(queues[f"r{i}"] for i in range(8)) <= 40
    queues.clear()
    assert pick(policy, ADAPTER, queues, now=20.0)
    assert policy.width("adapter") == wide, "not at once"
    for second in range(30, 30 + 40 * wide):
        pick(policy, ADAPTER, queues, now=float(second))
    assert policy.width("adapter") == 1


def test_a_width_does_not_flap() -> None:
    """A load that rises and falls every few seconds: the home grows, and stays."""
    policy, changes, last = routing(*replicas(8), settle_s=30.0), 0, 1
    for second in range(120):
        heavy = second % 10 < 5
        queues = Counter({f"r{i}": 0 for i in range(8)})
        for _ in range(60 if heavy else 2):
            queues[pick(policy, ADAPTER, queues, now=float(second))] += 1
        changes += policy.width("adapter") != last
        last = policy.width("adapter")
    assert 1 <= changes <= 7


def test_a_replica_that_left_the_list_is_never_named_again() -> None:
    """Told to stop, ill or dead: whatever is remembered of it."""
    views = [ReplicaView("r0", {"adapter": Tier.ON_DEVICE}), ReplicaView("r1")]
    policy, key = routing(*views), RouteKey(prefix=7)
    policy.routed(ADAPTER, "r0", 0.0)
    policy.routed(key, "r0", 0.0)
    policy.update(views[1:])
    assert policy.rank(ADAPTER, lambda name: 0, 0.0) == [["r1"]]
    assert policy.rank(key, lambda name: 0, 0.0) == [["r1"]]
    policy.update([])
    assert policy.rank(ADAPTER, lambda name: 0, 0.0) == []


def test_a_prefix_comes_back_to_where_it_was_until_that_is_busy() -> None:
    policy, queues = routing(*replicas(8)), Counter[str]()
    key = RouteKey(prefix=7)
    place = pick(policy, key, queues)
    assert {pick(policy, key, queues) for _ in range(20)} == {place}
    queues[place] = 100
    assert pick(policy, key, queues) != place


def test_base_requests_spread_over_the_shorter_queues() -> None:
    policy, queues = routing(*replicas(8)), Counter[str]()
    for _ in range(800):
        queues[pick(policy, RouteKey(), queues)] += 1
    assert max(queues.values()) - min(queues.values()) < 10


def test_an_adapter_that_was_sent_for_counts_as_coming_for_a_while() -> None:
    policy = routing(*replicas(2), report_s=5.0)
    home = pick(policy, ADAPTER, Counter(), now=0.0)
    assert policy.score(home, ADAPTER, 0, now=1.0) > policy.score(home, ADAPTER, 0, now=6.0)


VIEWS = st.lists(
    st.builds(
        ReplicaView,
        st.sampled_from([f"r{i}" for i in range(12)]),
        st.dictionaries(st.sampled_from("abc"), st.sampled_from(list(Tier))),
        st.booleans(),
    ),
    max_size=12,
    unique_by=lambda view: view.name,
)
STEPS = st.lists(
    st.tuples(VIEWS, st.sampled_from(["a", "b", "z", None]), st.none() | st.integers(0, 3), st.integers(0, 400)),
    max_size=12,
)


@given(STEPS)
def test_whatever_replicas_say_a_request_has_a_place(
    steps: list[tuple[list[ReplicaView], str | None, int | None, int]],
) -> None:
    """Groups name replicas that take work, each once, and scores lie in [0, 1]; reports may be as stale as they like."""
    policy, now = AdapterRouting(rng=random.Random(0)), 0.0
    for views, adapter, prefix, queue in steps:
        policy.update(views)
        now += 3.0
        key = RouteKey(adapter, prefix)
        working = {view.name for view in views}
        groups = policy.rank(key, lambda name, most=queue: hash(name) % (most + 1), now)  # type: ignore[misc]
        named = [name for group in groups for name in group]
        assert len(named) == len(set(named))
        assert set(named) <= working
        assert bool(named) == bool(working)
        assert all(groups)
        for name in named:
            assert 0.0 <= policy.score(name, key, queue, now) <= 1.0
        if named:
            policy.routed(key, named[0], now)


def test_weights_add_up_to_one() -> None:
    o = RoutingOptions()
    weights = (o.residency_weight, o.queue_weight, o.prefix_weight, o.home_weight, o.slots_weight)
    assert sum(weights) == pytest.approx(1.0)


def test_what_a_router_remembers_is_bounded() -> None:
    policy = routing(*replicas(3), remembered=10)
    for i in range(1000):
        pick(policy, RouteKey(f"a{i}", i), Counter())
    kept = (policy._homes, policy._coming, policy._prefixes)
    assert [len(part) for part in kept] == [10, 10, 10]
