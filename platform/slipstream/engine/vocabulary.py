"""Draft vocabularies: the tokens that one adapter's requests are made of, among which its streams pick. Pure Python.

An adapter says little that it has not said before, or been told in a prompt: 3% of the tokens of a task's answers. Scores of
a thousand ids cost a fraction of those of a whole vocabulary. After FR-Spec (arXiv 2502.14856), whose vocabulary is
chosen once, by frequency in a corpus; here it is what the adapter's requests hold, and changes with them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence

MOST_IDS = 4096
MOST_MISSED = 0.15  # share of what the model says that the vocabulary may lack, for streams to pick from it
MEMORY = 0.98  # what a token said still counts for in that share, one token later
READ_AT_MOST = 4096  # tokens of a prompt, from its end


class DraftVocabulary:
    """One adapter's. Sorted ids of 4 bytes each, since thousands of adapters are remembered.

    Ids that were not met for long are forgotten: as soon as half of `MOST_IDS` have been met anew, they are all that is left.
    """

    __slots__ = ("_anew", "_ids", "_missed", "_shown")

    def __init__(self) -> None:
        self._ids = array("i")
        self._anew = array("i")  # those met since ids were last forgotten
        self._shown: array[int] | None = None  # a copy of `_ids`, which stays as it is
        self._missed = 1.0

    @property
    def serves(self) -> bool:
        """Whether it lacks little of what the model says."""
        return self._missed < MOST_MISSED

    @property
    def ids(self) -> array[int]:
        """int32, ascending; never changed later on."""
        if self._shown is None:
            self._shown = self._ids[:]
        return self._shown

    def read(self, prompt: Sequence[int]) -> None:
        """The model was told so, and may repeat it."""
        self._meet({*prompt[-READ_AT_MOST:]})

    def learn(self, said: Sequence[int]) -> None:
        """The model said so."""
        for token in said:
            self._missed = MEMORY * self._missed + (1.0 - MEMORY) * (not _holds(self._ids, token))
            self._meet((token,))

    def _meet(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if not _add(self._anew, token):
                continue
            if _add(self._ids, token):
                self._shown = None
            if len(self._anew) >= MOST_IDS // 2:
                self._ids, self._anew, self._shown = self._anew, array("i"), None


def _holds(ids: array[int], token: int) -> bool:
    place = bisect_left(ids, token)
    return place < len(ids) and ids[place] == token


def _add(ids: array[int], token: int) -> bool:
    """Whether it was not there."""
    place = bisect_left(ids, token)
    if place < len(ids) and ids[place] == token:
        return False
    ids.insert(place, token)
    return True
