"""Long prompts leave those who are decoding their pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.pacing import CHUNK_STEP, FIRST_CHUNK, PromptPacer

STRETCH = 2.5


def feel(pacer: PromptPacer, decodes: int, plain: float, fixed: float, row: float, steps: int) -> list[float]:
    """A long prompt beside so many decodes, no plain step in between: what its steps take."""
    taken = []
    for _ in range(steps):
        rows = pacer.rows()
        taken.append(plain + fixed + rows * row)
        pacer.observe(decodes, rows, 0, taken[-1])
    return taken


def test_before_anything_was_measured_a_chunk_is_small() -> None:
    pacer = PromptPacer(STRETCH)
    assert pacer.rows() == FIRST_CHUNK
    pacer.observe(4, 64, 0, 1.0)  # nothing to compare with yet
    assert pacer.rows() == FIRST_CHUNK


@pytest.mark.parametrize(("decodes", "others"), [(0, 0), (4, 300)])
def test_steps_that_mix_in_something_else_teach_nothing(decodes: int, others: int) -> None:
    pacer = PromptPacer(STRETCH)
    pacer.observe(4, 0, 0, 0.040)
    pacer.observe(decodes, 512, others, 100.0)
    assert pacer.rows() == FIRST_CHUNK


@given(st.floats(0.001, 1.0), st.floats(0.0, 0.9), st.floats(0.002, 2.0), st.integers(CHUNK_STEP, 4000))
def test_steps_settle_below_the_stretch_and_use_it(plain: float, fixed: float, row: float, first: int) -> None:
    """Whatever came before, and though a chunk costs something before its first row: neither stuck small nor too long."""
    pacer = PromptPacer(STRETCH)
    pacer.observe(8, 0, 0, plain)
    feel(pacer, 8, plain, first * plain, 0.0, 12)  # a bad start
    extra, per_row = fixed * plain, row * plain / 100
    last = feel(pacer, 8, plain, extra, per_row, 120)[-20:]
    assert min(last) <= STRETCH * plain * 1.001 or pacer.rows() == CHUNK_STEP
    if plain + extra + 3 * CHUNK_STEP * per_row < STRETCH * plain:
        assert max(last) >= 0.5 * STRETCH * plain


def test_fewer_decodes_in_the_middle_of_a_prompt_do_not_bring_the_stall_back() -> None:
    pacer = PromptPacer(STRETCH)
    for _ in range(5):
        pacer.observe(1, 0, 0, 0.030)
        pacer.observe(32, 0, 0, 0.120)
    feel(pacer, 32, 0.120, 0.0, 0.002, 40)
    late = feel(pacer, 1, 0.030, 0.0, 0.002, 10)[3:]
    assert max(late) <= 1.2 * STRETCH * 0.030


def test_more_decodes_in_the_middle_of_a_prompt_do_not_stop_it() -> None:
    pacer = PromptPacer(STRETCH)
    for _ in range(5):
        pacer.observe(1, 0, 0, 0.030)
        pacer.observe(32, 0, 0, 0.120)
    feel(pacer, 1, 0.030, 0.0, 0.002, 40)
    before = pacer.rows()
    feel(pacer, 32, 0.120, 0.0, 0.002, 40)
    assert pacer.rows() >= 2 * before


def test_one_disturbed_step_is_soon_forgotten() -> None:
    pacer = PromptPacer(STRETCH)
    for _ in range(5):
        pacer.observe(8, 0, 0, 0.050)
    pacer.observe(8, 0, 0, 30.0)  # a kernel was compiled
    for _ in range(10):
        pacer.observe(8, 0, 0, 0.050)
    assert max(feel(pacer, 8, 0.050, 0.0, 0.002, 30)[-10:]) <= 1.25 * STRETCH * 0.050
