"""Turns of tenants at a busy engine: the next sequence to start is of the tenant that was served least.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant's work is
counted, divided by its weight; one that had nothing waiting is lifted to the least of those that wait, so nobody saves up
turns. While two tenants have sequences waiting, what they got differs by no more than a few sequences' work. Pure Python.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence

from slipstream.engine.sequence import Sequence as Waiting

REMEMBERED = 4096  # tenants without a sequence whose counters are kept: one that leaves and comes back gains nothing


class FairShare:
    """What each tenant has had of one engine. Owned by its scheduler."""

    def __init__(self) -> None:
        self._used: OrderedDict[str, float] = OrderedDict()  # work over weight; who left longest ago comes first
        self._weights: dict[str, float] = {}  # of those who are here
        self._open: Counter[str] = Counter()  # sequences, waiting or running
        self._floor = 0.0  # counter of the last who started one

    def enter(self, tenant: str, weight: float, waiting: Iterable[Waiting]) -> None:
        """A sequence has come, beside those that wait. A tenant of which none waits has not been kept waiting, and is owed
        nothing: it begins with the least of those that wait."""
        tenants = {seq.tenant for seq in waiting}
        if tenant not in tenants:
            least = min((self._used[other] for other in tenants), default=self._floor)
            self._used[tenant] = max(self._used.pop(tenant, 0.0), least)
            while len(self._used) > REMEMBERED + len(self._open) + 1:
                self._used.popitem(last=False)
        self._weights[tenant] = weight
        self._open[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A sequence has ended."""
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant], self._weights[tenant]
            self._used.move_to_end(tenant)
            for here in self._open:
                self._used.move_to_end(here)

    def start(self, tenant: str, work: float) -> None:
        """A sequence starts, with so much work in its prompt."""
        self.charge(tenant, work)
        self._floor = self._used[tenant]

    def charge(self, tenant: str, work: float) -> None:
        """Work in answer tokens was done for it."""
        self._used[tenant] += work / self._weights[tenant]

    def ranked(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """As `order`, if nobody is charged meanwhile."""
        return sorted(waiting, key=lambda seq: (not seq.begun, seq.begun or self._used[seq.tenant]))

    def order(self, waiting: Sequence[Waiting]) -> Iterator[Waiting]:
        """Who starts next, each decided when it is asked for: those in the middle of an answer, then the first of the tenant
        that has had least. waiting: by priority and arrival, which is their order within a tenant."""
        yield from sorted((seq for seq in waiting if seq.begun), key=lambda seq: seq.seq_id)
        queues: dict[str, deque[Waiting]] = {}
        for seq in waiting:
            if not seq.begun:
                queues.setdefault(seq.tenant, deque()).append(seq)
        while queues:
            tenant = min(queues, key=self._used.__getitem__)
            yield queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]
