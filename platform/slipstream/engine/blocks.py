"""Blocks of the paged KV cache: reference counts, a free list in least-recently-used order, and the prefix cache's index.

Pure Python. A block is *referenced* (some sequence's table holds it) or *free*. A free block may still hold the keys and
values of a published prefix; it is found again through its hash, or as the one that begins most like what is wanted, until it
is handed out for something else.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block given its predecessor's: 16 bytes of BLAKE2b, so that a collision cannot be found by a tenant."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def root_hash(tenant: str, adapter_digest: str | None) -> bytes:
    """Where a chain starts: tenants never share KV (timing would tell), and adapters change keys and values."""
    return hashlib.blake2b(f"{tenant}\0{adapter_digest or ''}".encode(), digest_size=16).digest()


class Link(NamedTuple):
    """A full block's place in a chain: the hash of what precedes it, its own tokens (int32), and the hash of both."""

    parent: bytes
    tokens: array[int]
    hash: bytes

    @staticmethod
    def of(parent: bytes, tokens: Sequence[int]) -> Link:
        """The link that `tokens` make after `parent`."""
        return Link(parent, array("i", tokens), chain_hash(parent, tokens))


class BlockPool:
    """Owner of all blocks of one engine."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first = handed out next
        self._link_of: dict[int, Link] = {}
        self._block_of: dict[bytes, int] = {}
        self._after: dict[bytes, list[tuple[array[int], int]]] = {}  # parent -> (tokens, block) by tokens

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing taken) when there are too few."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._refs[block] = 1
            taken.append(block)
        return sorted(taken)  # blocks that lie side by side are attended without a copy

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each. Later blocks of a chain become evictable before earlier ones."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if block not in self._link_of:
                    self._free.move_to_end(block, last=False)  # nothing to lose: hand it out first

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Reference and return the blocks of the longest published prefix of `hashes`."""
        found = []
        for h in hashes:
            block = self._block_of.get(h)
            if block is None:
                break
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1
            found.append(block)
        return found

    def similar(self, parent: bytes, tokens: Sequence[int], least: int = 1) -> tuple[int, int]:
        """The published block after `parent` that begins most like `tokens`, and how many tokens they share; none that shares
        fewer than `least`: (-1, 0).

        Among tuples in order, the one that shares most with another lies next to where that one would be.
        """
        siblings, wanted = self._after.get(parent, []), array("i", tokens)
        at = bisect_left(siblings, (wanted,))
        best, most = -1, 0
        for held, block in siblings[max(0, at - 1) : at + 1]:
            shared = next((i for i, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), len(wanted))
            if shared > most and shared >= least:
                best, most = block, shared
        if best in self._free:
            self._free.move_to_end(best)
        return best, most

    def publish(self, block: int, link: Link) -> None:
        """Make a full, committed block findable. The first publisher of a hash keeps it."""
        if link.hash not in self._block_of and block not in self._link_of:
            self._block_of[link.hash] = block
            self._link_of[block] = link
            insort(self._after.setdefault(link.parent, []), (link.tokens, block))

    def _forget(self, block: int) -> None:
        link = self._link_of.pop(block, None)
        if link is None:
            return
        del self._block_of[link.hash]
        siblings = self._after[link.parent]
        del siblings[bisect_left(siblings, (link.tokens, block))]
        if not siblings:
            del self._after[link.parent]

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Every block is free or referenced exactly as often as the sequences' tables say."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        assert counts == self._refs, "reference counts differ from the sequences' tables"
        assert set(self._free) == {b for b, refs in enumerate(self._refs) if refs == 0}, "free list is wrong"
        hashes = {block: link.hash for block, link in self._link_of.items()}
        assert {b: h for h, b in self._block_of.items()} == hashes, "prefix index is not one to one"
        places = {block: (link.parent, link.tokens) for block, link in self._link_of.items()}
        held = [(block, (p, tokens)) for p, siblings in self._after.items() for tokens, block in siblings]
        assert len(held) == len(places), "a published block is missing beside its siblings, or there twice"
        assert dict(held) == places, "a published block lies beside the wrong siblings"
        assert all(a < b for siblings in self._after.values() for a, b in pairwise(siblings)), "siblings out of order"
