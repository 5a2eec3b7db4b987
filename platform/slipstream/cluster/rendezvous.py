"""Rendezvous hashing (Thaler and Ravishankar, 1998): each key has its own order of replicas, which stays put as others come
and go. A replica that leaves hands its keys to the next in each key's order, one that comes takes its share, no more."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable

_MASK = (1 << 64) - 1


def seed_of(name: str) -> int:
    """A name as 64 well-mixed bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def weight(key: int, member: int) -> int:
    """How much a key wants a member; both are seeds. splitmix64's finaliser over their sum (Steele et al., 2014)."""
    z = (key + member * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def first(key: str, members: Iterable[tuple[str, int]], count: int) -> list[str]:
    """The `count` members that `key` wants most, best first. members: (name, seed of the name)."""
    seed = seed_of(key)
    return [name for _, name in heapq.nlargest(count, ((weight(seed, own), name) for name, own in members))]
