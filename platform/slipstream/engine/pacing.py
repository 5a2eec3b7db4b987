"""How much of a long prompt a step takes while others are decoding, so that their next token is not kept waiting.

A prompt that needs several steps anyway takes more and shorter ones: as many rows as stretch a step to `stretch` times
what it takes without (the stall-free batching of Sarathi-Serve, arXiv 2403.02310, with the chunk found by measurement:
what a row costs depends on the context, the adapters and the machine). Pure Python, no clock: it is told what steps took.
"""

from __future__ import annotations

FIRST_CHUNK = 64  # rows, before anything was measured
LEAST_CHUNK = 8  # rows: a long prompt always gets on, and chunks are multiples of it
FORGET = 0.3  # weight of the newest step in the averages


class PromptPacer:
    """Rows of long prompts for each step; owned by the scheduler."""

    def __init__(self, stretch: float) -> None:
        """`stretch`: how many times as long as a step of decodes alone one with prompt rows may take, over 1."""
        assert stretch > 1.0
        self._stretch = stretch
        self._plain_s: float | None = None  # a step of decodes alone
        self._row_s: float | None = None  # what a prompt row adds

    def rows(self) -> int:
        """Most rows of long prompts in a step that also decodes."""
        if self._plain_s is None or self._row_s is None:
            return FIRST_CHUNK
        rows = int((self._stretch - 1.0) * self._plain_s / self._row_s)
        return max(LEAST_CHUNK, rows // LEAST_CHUNK * LEAST_CHUNK)

    def observe(self, decodes: int, prompt_rows: int, seconds: float) -> None:
        """A step with so many decoding sequences and rows of prompts (long or short) took so long."""
        if not decodes:
            return
        if not prompt_rows:
            self._plain_s = _blend(self._plain_s, seconds)
        elif self._plain_s is not None:
            added = max(seconds - self._plain_s, 1e-3 * self._plain_s)  # noise must not make rows free
            self._row_s = _blend(self._row_s, added / prompt_rows)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1.0 - FORGET) * old + FORGET * new
