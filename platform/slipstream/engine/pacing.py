"""How much of a long prompt a step takes while others are decoding, so that their next token is not kept waiting.

A prompt that needs several steps anyway takes more and shorter ones: as many rows as stretch a step to `stretch` times what
it takes without (the stall-free batching of Sarathi-Serve, arXiv 2403.02310, with the chunk found by measurement: what rows
cost depends on the context, the adapters and the machine, and is no straight line). Pure Python, no clock: it is told what
steps took, and feels its way.
"""

from __future__ import annotations

FIRST_CHUNK = 64  # rows, before anything was measured
CHUNK_STEP = 8  # rows: the smallest chunk, so that a long prompt always gets on; chunks are multiples of it
LARGEST_CHUNK = 1 << 16  # rows; the scheduler's budget is the bound that counts
MOST_SHRINK, LEAST_SHRINK = 0.5, 0.9  # of a chunk whose step was too long
GROW = 1.25  # of a chunk whose step was well below what it may take
ROOM = 0.8  # share of the time allowed below which the chunk grows
FORGET = 0.3  # weight of the newest step in the averages
DISTURBED = (
    5.0  # a step of decodes counts as this many times the average at most: a kernel compiled, or the machine paused
)


class PromptPacer:
    """Rows of long prompts for each step; owned by the scheduler."""

    def __init__(self, stretch: float) -> None:
        """`stretch`: how many times as long as a step of decodes alone one with prompt rows may take, over 1."""
        assert 1.0 < stretch < float("inf")
        self._stretch = stretch
        self._plain_s: dict[int, float] = {}  # steps of decodes alone, by how many there are: 1, 2 to 3, 4 to 7 …
        self._rows = FIRST_CHUNK

    def rows(self) -> int:
        """Most rows of long prompts in a step that also decodes."""
        return self._rows

    def observe(self, decodes: int, paced_rows: int, other_rows: int, seconds: float) -> None:
        """A step with so many decoding sequences, rows of long prompts and rows of others took so long."""
        if not decodes or other_rows:
            return
        size = decodes.bit_length()
        if not paced_rows:
            known = self._plain_s.get(size, seconds)
            self._plain_s[size] = (1.0 - FORGET) * known + FORGET * min(seconds, DISTURBED * known)
        elif self._plain_s:
            self._adjust(paced_rows, self._plain_s[min(self._plain_s, key=lambda s: (abs(s - size), s))], seconds)

    def _adjust(self, rows: int, plain_s: float, seconds: float) -> None:
        most = self._stretch * plain_s
        if seconds > most:
            self._rows = _whole(min(self._rows, rows) * min(LEAST_SHRINK, max(MOST_SHRINK, most / seconds)))
        elif seconds < ROOM * most and rows >= self._rows:
            self._rows = min(LARGEST_CHUNK, max(self._rows + CHUNK_STEP, _whole(self._rows * GROW)))


def _whole(rows: float) -> int:
    return max(CHUNK_STEP, int(rows) // CHUNK_STEP * CHUNK_STEP)
