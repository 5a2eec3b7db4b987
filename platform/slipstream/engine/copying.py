"""Drafts that are copied: what followed when the sequence's last tokens stood in it before.

Answers repeat their prompts: names, numbers, columns of a table, code. A speculator that sees one hidden state cannot copy,
and this cannot write; a draft may come from either (`chains.py`). After prompt lookup decoding (Saxena 2023) and LLMA
(arXiv 2304.04487). Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PLACES = 8  # occurrences of the last token that are compared, the latest first
LONGEST_MATCH = 12  # tokens; a longer match says no more
READ_AT_ONCE = 4096  # tokens: a long prompt is read over several steps


class Copied(NamedTuple):
    """`tokens` once followed the last `matched` tokens."""

    matched: int
    tokens: Sequence[int]


NOTHING = Copied(0, ())


class CopyIndex:
    """Where in one sequence each token stood last. Sequences only grow, so it reads every token once."""

    __slots__ = ("_places", "_read")

    def __init__(self) -> None:
        self._places: dict[int, list[int]] = {}
        self._read = 0

    def find(self, tokens: Sequence[int], most: int) -> Copied:
        """What followed the longest earlier match of the end of `tokens`, up to `most` tokens; of equal ones the latest."""
        last = len(tokens) - 1
        places = self._places
        end = min(last, self._read + READ_AT_ONCE)
        for i in range(self._read, end):
            own = places.setdefault(tokens[i], [])
            own.append(i)
            if len(own) > PLACES:
                del own[0]
        self._read = end
        if most < 1:
            return NOTHING
        found = places.get(tokens[last])
        if found is None:
            return NOTHING
        longest, start = 0, 0
        for place in reversed(found):
            length, bound = 1, min(LONGEST_MATCH, place + 1)
            while length < bound and tokens[place - length] == tokens[last - length]:
                length += 1
            if length > longest:
                longest, start = length, place + 1
        return Copied(longest, tokens[start : start + most])
