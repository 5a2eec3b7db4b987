"""Long prompts leave those who are decoding their pace."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.pacing import FIRST_CHUNK, LEAST_CHUNK, PromptPacer


def step_s(rows: int, plain: float, row: float) -> float:
    return plain + rows * row


def test_before_anything_was_measured_a_chunk_is_small() -> None:
    pacer = PromptPacer(2.5)
    assert pacer.rows() == FIRST_CHUNK
    pacer.observe(4, 64, 1.0)  # nothing to compare with yet
    assert pacer.rows() == FIRST_CHUNK


def test_prompts_without_decodes_teach_nothing() -> None:
    pacer = PromptPacer(2.5)
    pacer.observe(4, 0, 0.040)
    pacer.observe(4, 64, 0.104)
    before = pacer.rows()
    pacer.observe(0, 512, 100.0)
    assert pacer.rows() == before == 56  # 1.5 * 40 ms at 1 ms a row is 60, in eights 56


@given(st.floats(0.001, 1.0), st.floats(1e-6, 0.1), st.floats(1.1, 5.0), st.integers(0, 4000))
def test_steps_settle_at_the_stretch(plain: float, row: float, stretch: float, first: int) -> None:
    """Whatever came first, the chunk found is the largest that keeps to the stretch, if the least one does."""
    pacer = PromptPacer(stretch)
    pacer.observe(8, 0, plain)
    pacer.observe(8, first, step_s(first, plain, row * 3))
    for _ in range(60):
        pacer.observe(8, 0, plain)
        rows = pacer.rows()
        pacer.observe(8, rows, step_s(rows, plain, row))
    rows = pacer.rows()
    assert rows >= LEAST_CHUNK
    if rows > LEAST_CHUNK:
        assert step_s(rows, plain, row) <= stretch * plain * 1.01
    if (more := rows + LEAST_CHUNK) * row < 900 * plain:  # beyond, rows count as free
        assert step_s(more, plain, row) >= stretch * plain * 0.99
