"""The autoscaling policy: rate, bounds, delays, zero; each decision with its reason."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.cluster.rates import Rates
from slipstream.cluster.scaling import Cause, Decision, Load, ScalingOptions, ScalingPolicy
from slipstream.protocol import work
from slipstream.testing import ManualClock

OPTIONS = ScalingOptions(
    min_replicas=1, max_replicas=10, target_requests_per_s=2.0, up_delay_s=1.0, down_delay_s=60.0, to_zero_delay_s=120.0,
    cool_down_s=20.0,
)  # fmt: skip


class Deployment:
    """A deployment that does what the policy says, a second a tick."""

    def __init__(self, replicas: int = 1, **options: object) -> None:
        self.policy = ScalingPolicy(replace(OPTIONS, **options))  # type: ignore[arg-type]
        self.clock = ManualClock()
        self.replicas = replicas
        self.last = Decision(replicas, "")

    def tick(self, seconds: int = 1, **load: float) -> int:
        for _ in range(seconds):
            observed = {"requests_per_s": 0.0, "ongoing": 0, **load}
            seen = Load(replicas=self.replicas, target=self.replicas, **observed)  # type: ignore[arg-type]
            self.last = self.policy.decide(seen, self.clock())
            self.replicas = self.last.replicas
            self.clock.advance(1.0)
        return self.replicas


def test_replicas_follow_the_rate() -> None:
    deployment = Deployment()
    assert deployment.tick(2, requests_per_s=7.0, ongoing=5) == 4
    assert deployment.last.reason.startswith("steady") or "7.00 requests/s at 2 a replica" in deployment.last.reason


def test_up_is_fast_and_down_is_slow() -> None:
    deployment = Deployment()
    assert deployment.tick(requests_per_s=9.0) == 1, "one look is not enough"
    assert deployment.tick(requests_per_s=9.0) == 5
    assert deployment.tick(59, requests_per_s=1.0) == 5
    assert deployment.tick(3, requests_per_s=1.0) == 1


def test_a_short_dip_changes_nothing() -> None:
    deployment = Deployment()
    deployment.tick(2, requests_per_s=9.0)
    for _ in range(10):
        assert deployment.tick(30, requests_per_s=1.0) == 5
        assert deployment.tick(2, requests_per_s=9.0) == 5


def test_down_goes_to_the_most_that_was_wanted_lately() -> None:
    deployment = Deployment(replicas=9)
    deployment.tick(70, requests_per_s=18.0)
    deployment.tick(30, requests_per_s=9.0)
    assert deployment.tick(40, requests_per_s=2.0) == 5


def test_requests_count_by_their_tokens() -> None:
    deployment = Deployment(request_tokens=100.0)
    assert deployment.tick(2, requests_per_s=2.0, tokens_per_s=200.0) == 1
    assert deployment.tick(2, requests_per_s=2.0, tokens_per_s=1000.0) == 5, "long requests need more"
    assert work(100, 10) == pytest.approx(30.0)


def test_long_waits_ask_for_more_whatever_the_rate() -> None:
    deployment = Deployment(replicas=2, max_queue_wait_s=2.0)
    assert deployment.tick(2, requests_per_s=1.0, queue_wait_s=3.0, ongoing=9) == 3
    assert "wait 3.0 s" in deployment.last.reason
    assert deployment.tick(2, requests_per_s=1.0, queue_wait_s=300.0, ongoing=9) == 6, "at most twice as many at a time"


@pytest.mark.parametrize(
    ("load", "cause"),
    [
        ({"requests_per_s": 9.0}, Cause.RATE),
        ({"requests_per_s": 1.0, "queue_wait_s": 9.0, "ongoing": 9}, Cause.QUEUE_WAIT),
        ({"requests_per_s": 1.0, "slot_pressure": 2.0, "ongoing": 9}, Cause.SLOT_PRESSURE),
        ({"requests_per_s": 1.0, "held": 4, "ongoing": 9}, Cause.HELD),
    ],
)
def test_a_change_says_what_caused_it(load: dict[str, float], cause: Cause) -> None:
    deployment = Deployment(replicas=2)
    assert deployment.tick(2, **load) > 2
    assert deployment.last.cause is cause


def test_limits_and_idleness_are_causes_too() -> None:
    assert ScalingPolicy(OPTIONS).decide(Load(replicas=12, target=12, requests_per_s=40.0), 0.0).cause is Cause.LIMITS
    deployment = Deployment(min_replicas=0)
    assert deployment.tick(200) == 0
    assert deployment.last.cause is Cause.IDLE


def test_what_waits_taught_is_forgotten_one_replica_at_a_time() -> None:
    """Without that, the replicas that ended the waits would all be stopped two minutes later, and requests wait again."""
    deployment = Deployment(replicas=2, max_queue_wait_s=2.0)
    deployment.tick(2, requests_per_s=1.0, queue_wait_s=9.0, ongoing=9)
    assert deployment.tick(2, requests_per_s=1.0, queue_wait_s=9.0, ongoing=9) == 8
    seen = [deployment.tick(requests_per_s=1.0, ongoing=9) for _ in range(300)]
    assert all(before - after <= 1 for before, after in pairwise(seen))
    assert 3 <= seen[-1] < 8


def test_a_replica_that_is_on_its_way_is_waited_for() -> None:
    """Whoever asked may have given up meanwhile: stopped before it is there, it would never be there."""
    policy, now = ScalingPolicy(replace(OPTIONS, min_replicas=0)), 0.0
    for _ in range(1000):
        assert policy.decide(Load(replicas=0, target=1, requests_per_s=0.0), now).replicas == 1
        now += 1.0
    assert policy.decide(Load(replicas=1, target=1, requests_per_s=0.0), now + 60).replicas == 1


def test_slot_pressure_asks_for_more() -> None:
    deployment = Deployment(replicas=4)
    assert deployment.tick(2, requests_per_s=1.0, slot_pressure=1.2, ongoing=9) == 5
    assert "adapters a slot" in deployment.last.reason


def test_requests_that_no_replica_takes_ask_for_one_more() -> None:
    deployment = Deployment(replicas=2)
    assert deployment.tick(2, requests_per_s=1.0, held=4, ongoing=9) == 3


def test_zero_and_back() -> None:
    deployment = Deployment(min_replicas=0)
    assert deployment.tick(119) == 1
    assert deployment.tick(3) == 0
    assert deployment.tick(1000) == 0
    assert deployment.last.reason == "asleep: no requests"
    assert deployment.tick(held=1) == 1, "at once"
    assert "first replica" in deployment.last.reason
    assert deployment.tick(100, ongoing=1) == 1, "never with work in flight"


def test_many_replicas_fall_asleep_by_way_of_one() -> None:
    deployment = Deployment(replicas=5, min_replicas=0)
    seen = [deployment.tick() for _ in range(200)]
    assert sorted(set(seen)) == [0, 1, 5]


def test_never_outside_the_bounds() -> None:
    deployment = Deployment(min_replicas=2, max_replicas=3)
    assert deployment.tick(2, requests_per_s=1000.0) == 3
    assert deployment.tick(500) == 2


LOADS = st.lists(
    st.tuples(
        st.floats(0, 100), st.floats(0, 50), st.floats(0, 5), st.integers(0, 50), st.integers(0, 50), st.integers(1, 40)
    ),
    max_size=30,
)


@given(LOADS, st.integers(0, 3), st.integers(3, 20))
def test_whatever_comes_it_stays_within_bounds_and_cools_down(
    loads: list[tuple[float, float, float, int, int, int]], least: int, most: int
) -> None:
    deployment = Deployment(replicas=max(1, least), min_replicas=least, max_replicas=most)
    went_up = float("-inf")
    for rate, wait, pressure, held, ongoing, seconds in loads:
        for _ in range(seconds):
            before, now = deployment.replicas, deployment.clock()
            after = deployment.tick(
                requests_per_s=rate, queue_wait_s=wait, slot_pressure=pressure, held=held, ongoing=ongoing
            )
            assert least <= after <= most
            assert deployment.last.reason
            if after > before:
                went_up = now
            if after < before:
                assert now - went_up >= OPTIONS.cool_down_s
            if after == 0:
                assert not held
                assert not ongoing


def test_rates_are_of_the_window() -> None:
    rates = Rates(window_s=10.0)
    assert rates.per_s(0.0, 0, 0) == [0.0, 0.0]
    assert rates.per_s(1.0, 10, 50) == [2.0, 10.0], "a burst in the first second is no rate of ten a second"
    assert rates.per_s(5.0, 10, 50) == [2.0, 10.0]
    for second in range(6, 40):
        found = rates.per_s(float(second), 10, 50)
    assert found == [0.0, 0.0]
