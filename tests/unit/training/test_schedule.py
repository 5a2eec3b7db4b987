"""Learning rates, the gate, and a clock that steps or minutes drive."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.training.schedule import Clock, gate_value, learning_rate_factor

SHARES = st.floats(0, 1)


def test_the_learning_rate_rises_then_falls_along_half_a_cosine() -> None:
    assert [learning_rate_factor(p, 0.1) for p in (0.025, 0.05)] == pytest.approx([0.25, 0.5])
    assert learning_rate_factor(0.1, 0.1) == 1.0
    assert learning_rate_factor(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.1) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate_factor(0.0, 0.1) > 0, "the first step is not for nothing"
    assert learning_rate_factor(0.0, 0.0) == 1.0


@given(SHARES, SHARES, st.floats(0, 0.99))
def test_learning_rates_are_shares_and_fall_after_the_warm_up(a: float, b: float, warmup: float) -> None:
    low, high = sorted((a, b))
    first, second = (learning_rate_factor(p, warmup) for p in (low, high))
    assert 0 <= first <= 1
    if low >= warmup:
        assert second <= first + 1e-12


def test_the_gate_opens_along_half_a_sine() -> None:
    assert gate_value(0.19, 0.2, 0.1) == 0.0
    assert gate_value(0.2, 0.2, 0.1) == 0.0
    assert gate_value(0.6, 0.2, 0.1) == pytest.approx(0.1 * math.sin(math.pi / 4))
    assert gate_value(1.0, 0.2, 0.1) == pytest.approx(0.1)
    assert gate_value(1.0, 0.0, 0.0) == 0.0


@given(SHARES, st.floats(0, 0.99), SHARES)
def test_the_gate_never_passes_its_peak(progress: float, warmup: float, peak: float) -> None:
    assert 0 <= gate_value(progress, warmup, peak) <= peak


class Time:
    """A time that moves when told."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def test_steps_drive_a_run_without_a_time_limit() -> None:
    time = Time()
    clock = Clock(total_steps=10, now=time)
    clock.start()
    time.at += 10_000
    assert (clock.progress, clock.is_over) == (0.0, False)
    clock.step = 5
    assert clock.progress == 0.5
    clock.step = 12
    assert clock.progress == 1.0


def test_whichever_is_further_drives_a_run_with_one() -> None:
    time = Time()
    clock = Clock(total_steps=10, max_seconds=60.0, now=time)
    assert (clock.seconds, clock.progress) == (0.0, 0.0), "nothing passes before the first step"
    clock.start()
    time.at += 30
    clock.step = 2
    assert clock.progress == 0.5
    clock.step = 8
    assert clock.progress == 0.8
    time.at += 31
    assert (clock.progress, clock.is_over) == (1.0, True)


def test_a_resumed_run_keeps_the_time_it_had() -> None:
    time = Time()
    clock = Clock(total_steps=1000, max_seconds=60.0, seconds_before=45.0, now=time)
    clock.start()
    assert clock.progress == 0.75
    time.at += 15
    assert (clock.seconds, clock.is_over) == (60.0, True)


def test_workers_go_by_the_time_they_agreed_on() -> None:
    time = Time()
    clock = Clock(total_steps=1000, max_seconds=60.0, now=time)
    clock.start()
    time.at += 6
    clock.agreed = 30.0
    assert clock.progress == 0.5
