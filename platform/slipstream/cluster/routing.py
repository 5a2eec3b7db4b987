"""Which replica a request goes to: score in [0, 1] → pick, among those that take work. No Ray, clock or torch inside.

An adapter has a *home*: the first `width` replicas of its own rendezvous order. Width is 1 for most, so a cold adapter is
always loaded in the same place; it grows while its replicas are busier than the others by a margin (consistent hashing with
bounded loads, Mirrokni et al., 2018) and shrinks only after a while in which fewer would have done, so that adapters do not
flap. Two of them, drawn for each request, speak for all, so that a wide home grows as fast as requests come. Within home and
the replicas that already hold the adapter the best score wins; among equals the shorter of two queues drawn at random (power
of two choices). What replicas report about themselves is a hint: a stale hint costs a load, never a request.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from slipstream.cluster.rendezvous import first, seed_of

K = TypeVar("K")
V = TypeVar("V")


class Tier(StrEnum):
    """How near an adapter is on a replica, as far as a router knows."""

    ON_DEVICE = "device"  # answers with the next step
    COMING = "coming"  # on its way: this router has sent a request for it, or the replica is fetching it
    ON_HOST = "host"  # a copy away
    ABSENT = "absent"  # must be fetched


_HOLDERS = 4
_SHRINK = 8  # a wide home shrinks by an eighth at a time
_NEAR = {Tier.ON_DEVICE: 1.0, Tier.COMING: 0.9, Tier.ON_HOST: 0.7, Tier.ABSENT: 0.0}


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What a router knows of a replica beside its queue."""

    name: str
    tiers: Mapping[str, Tier] = field(default_factory=dict)  # digest → where; what is missing is ABSENT
    has_room: bool = True  # an adapter slot that no running request holds


@dataclass(frozen=True, slots=True)
class RouteKey:
    """What of a request matters for its place."""

    adapter: str | None = None  # digest; None = the base model
    prefix: int | None = None  # stands for the beginning of the prompt, tenant and adapter included


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """Weights of the score (they add up to 1) and the patience of its sets."""

    batch: int = 64  # requests that a replica runs at once; a queue of twice that scores 0
    residency_weight: float = 0.4
    queue_weight: float = 0.3
    prefix_weight: float = 0.15
    home_weight: float = 0.1  # so that an adapter leaves a replica that is its home no longer
    slots_weight: float = 0.05
    equal: float = 0.03  # scores this close are equals
    spread_margin: int = 8  # requests over the mean at which an adapter's home grows …
    spread_factor: float = 1.25  # … but at least this many times the mean
    settle_s: float = 30.0  # a home shrinks after it was too wide for so long
    report_s: float = 5.0  # how long a router trusts its own guess that an adapter is coming
    remembered: int = 4096  # adapters and prefixes a router remembers


@dataclass(slots=True)
class _Home:
    """An adapter's replicas, in its own order."""

    width: int = 1
    order: list[str] = field(default_factory=list)  # at least `width` of them
    version: int = -1  # of the membership that `order` was made from
    calm_since: float | None = None  # since when one replica fewer would have done

    @property
    def members(self) -> list[str]:
        """The replicas that it is."""
        return self.order[: self.width]


QueueOf = Callable[[str], int]


class AdapterRouting:
    """One router's state. `queue_of` tells the requests on a replica, as far as known; `now` is in seconds."""

    def __init__(self, options: RoutingOptions | None = None, rng: random.Random | None = None) -> None:
        self.options = options or RoutingOptions()
        self._rng = rng or random.Random()  # noqa: S311 - it spreads load, it guards nothing
        self._views: dict[str, ReplicaView] = {}
        self._members: list[tuple[str, int]] = []  # those that take work, with their seeds
        self._names: list[str] = []
        self._holders: dict[str, list[str]] = {}  # digest → replicas that reported it
        self._version = 0
        self._homes: OrderedDict[str, _Home] = OrderedDict()
        self._coming: OrderedDict[tuple[str, str], float] = OrderedDict()  # (digest, replica) → when it was sent there
        self._prefixes: OrderedDict[int, str] = OrderedDict()
        self._mean: tuple[float, float] = (float("-inf"), 0.0)  # when, and the mean queue then

    def update(self, views: Sequence[ReplicaView]) -> None:
        """The replicas that take work, all of one base: Serve's list, which leaves out those that are ill or told to stop.
        Called whenever one comes, goes, or reports anew."""
        self._views = {view.name: view for view in views}
        names = [view.name for view in views]
        if set(names) != set(self._names):
            self._version += 1
        self._names = names
        self._members = [(name, seed_of(name)) for name in names]
        self._holders = {}
        for view in views:
            for digest in view.tiers:
                self._holders.setdefault(digest, []).append(view.name)

    def rank(self, key: RouteKey, queue_of: QueueOf, now: float) -> list[list[str]]:
        """Replicas in groups, best first: of a group the one with the shortest queue is meant, and the next group only if
        none of it takes the request. Empty when there is no replica."""
        if not self._names:
            return []
        best = self._base(key, queue_of) if key.adapter is None else self._adapter(key, key.adapter, queue_of, now)
        named = {name for group in best for name in group}
        rest = [name for name in self._draw(self._names, 4) if name not in named]
        return [*best, rest] if rest else best

    def routed(self, key: RouteKey, replica: str, now: float) -> None:
        """A replica has taken a request."""
        if key.adapter is not None:
            _remember(self._coming, (key.adapter, replica), now, self.options.remembered)
        if key.prefix is not None:
            _remember(self._prefixes, key.prefix, replica, self.options.remembered)

    def width(self, digest: str) -> int:
        """Replicas that an adapter is at home on."""
        home = self._homes.get(digest)
        return home.width if home is not None else 1

    # -- the two kinds of requests ---------------------------------------------------------------------------------

    def _base(self, key: RouteKey, queue_of: QueueOf) -> list[list[str]]:
        candidates = self._draw(self._names, 2)
        known = self._prefixes.get(key.prefix) if key.prefix is not None else None
        if known is not None and known in self._views and known not in candidates:
            candidates.append(known)
        return self._best_first(candidates, key, queue_of, 0.0)

    def _adapter(self, key: RouteKey, digest: str, queue_of: QueueOf, now: float) -> list[list[str]]:
        home = self._home(digest)
        newcomer = self._resize(home, queue_of, now)
        if newcomer is not None:
            others = [name for name in home.members if name != newcomer]
            return [[newcomer], *([others] if others else [])]
        names = home.members
        busy = self._bound(queue_of, now)
        # Left over from a wider home, or from before a replica came. A few of them: a hot adapter may be everywhere.
        for name in self._draw(self._holders.get(digest, ()), _HOLDERS):
            if name not in names and queue_of(name) <= busy:
                names.append(name)
        return self._best_first(names, key, queue_of, now)

    def _home(self, digest: str) -> _Home:
        home = self._homes.get(digest)
        if home is None:
            home = _Home()
        _remember(self._homes, digest, home, self.options.remembered)
        home.width = min(home.width, len(self._names))
        self._order(digest, home)
        return home

    def _order(self, digest: str, home: _Home) -> None:
        wanted = min(len(self._names), 2 * home.width)
        if home.version != self._version or len(home.order) < wanted:
            home.order = first(digest, self._members, wanted)
            home.version = self._version

    def _resize(self, home: _Home, queue_of: QueueOf, now: float) -> str | None:
        """Grow by one, or shrink; returns the replica that came."""
        bound = self._bound(queue_of, now)
        if min(map(queue_of, self._draw(home.members, 2))) > bound and home.width < len(self._names):
            if len(home.order) <= home.width:  # the order was cut at twice the width; the next call makes a longer one
                return None
            home.width += 1
            home.calm_since = None
            return home.order[home.width - 1]
        if home.width == 1:
            return None
        # Would it come back without the last one? Not while the others are well under the bound.
        if min(map(queue_of, self._draw(home.members[:-1], 2))) > (self._mean[1] + bound) / 2:
            home.calm_since = None
        elif home.calm_since is None:
            home.calm_since = now
        elif now - home.calm_since >= self.options.settle_s:
            home.width -= max(1, home.width // _SHRINK)
            home.calm_since = now
        return None

    # -- scores ----------------------------------------------------------------------------------------------------

    def _bound(self, queue_of: QueueOf, now: float) -> float:
        """Requests on a replica above which an adapter wants another one; the mean is a sample's, twenty times a second."""
        when, mean = self._mean
        if now - when > 0.05:
            sample = self._draw(self._names, 32)
            mean = sum(map(queue_of, sample)) / len(sample)
            self._mean = (now, mean)
        return max(mean + self.options.spread_margin, mean * self.options.spread_factor)

    def score(self, name: str, key: RouteKey, queue: int, now: float) -> float:
        """How good a replica is for a request, in [0, 1]."""
        o, view = self.options, self._views[name]
        near = _NEAR[self._tier(view, key.adapter, now)]
        quiet = max(0.0, 1.0 - queue / (2 * o.batch))
        room = 1.0 if near >= _NEAR[Tier.COMING] or view.has_room else 0.0
        prefix = 1.0 if key.prefix is not None and self._prefixes.get(key.prefix) == name else 0.0
        at_home = 1.0 if key.adapter is None or name in self._homes[key.adapter].members else 0.0
        return (
            o.residency_weight * near
            + o.queue_weight * quiet
            + o.prefix_weight * prefix
            + o.home_weight * at_home
            + o.slots_weight * room
        )

    def tier(self, name: str, adapter: str, now: float) -> Tier:
        """How near an adapter is on a replica, as far as this router knows."""
        view = self._views.get(name)
        return self._tier(view, adapter, now) if view is not None else Tier.ABSENT

    def _tier(self, view: ReplicaView, digest: str | None, now: float) -> Tier:
        if digest is None:
            return Tier.ON_DEVICE
        reported = view.tiers.get(digest, Tier.ABSENT)
        if reported is Tier.ABSENT:
            sent = self._coming.get((digest, view.name))
            if sent is not None and now - sent < self.options.report_s:
                return Tier.COMING
        return reported

    def _best_first(self, names: Sequence[str], key: RouteKey, queue_of: QueueOf, now: float) -> list[list[str]]:
        scored = sorted(((self.score(name, key, queue_of(name), now), name) for name in names), reverse=True)
        best = scored[0][0]
        equals = [name for value, name in scored if best - value <= self.options.equal]
        others = [name for value, name in scored if best - value > self.options.equal]
        picked = self._draw(equals, 2)
        left = [name for name in (*equals, *others) if name not in picked]
        return [picked, left] if left else [picked]

    def _draw(self, names: Sequence[str], count: int) -> list[str]:
        return list(names) if len(names) <= count else self._rng.sample(names, count)


def _remember(kept: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    """The least recently used entry goes."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > limit:
        kept.popitem(last=False)
