"""What of a sequence is in the prefix cache, and which of its blocks others may reuse. Pure Python.

Full blocks are shared. Where the next one differs, or its sequence ends within it, a block that begins alike is copied: an
adapter's prompts begin with its template, which ends anywhere (docs/decisions/0038).
"""

from __future__ import annotations

from typing import NamedTuple

from slipstream.engine.blocks import BlockPool, Link, root_hash
from slipstream.engine.sequence import Sequence

LEAST_SHARE = 4  # of a block, the part that must be alike: a copy costs about what a token or two do


class Prefix(NamedTuple):
    """What need not be computed: the first `known` tokens, in `blocks` and, if those hold fewer, `similar`."""

    blocks: list[int]
    similar: int
    known: int


def find(seq: Sequence, pool: BlockPool) -> Prefix:
    """The longest prefix of a sequence that is there; `blocks` are referenced from now on.

    Never all tokens, since the last one's logits are needed.
    """
    size, most = pool.block_size, len(seq.tokens) - 1
    _extend(seq, most // size, size)
    blocks = pool.match([link.hash for link in seq.links[: most // size]])
    known = len(blocks) * size
    rest = seq.tokens[known : min(known + size, most)]
    similar, shared = pool.similar(_parent(seq, len(blocks)), rest, least=size // LEAST_SHARE)
    return Prefix(blocks, similar, known + shared)


def publish(seq: Sequence, pool: BlockPool) -> None:
    """Make full blocks of committed tokens findable; drafts never are."""
    full = seq.num_computed // pool.block_size
    _extend(seq, full, pool.block_size)
    for i in range(seq.num_published, full):
        pool.publish(seq.blocks[i], seq.links[i])
    seq.num_published = max(seq.num_published, full)


def _extend(seq: Sequence, count: int, size: int) -> None:
    while len(seq.links) < count:
        i = len(seq.links)
        seq.links.append(Link.of(_parent(seq, i), seq.tokens[i * size : (i + 1) * size]))


def _parent(seq: Sequence, index: int) -> bytes:
    """The hash of all before the block of that index."""
    return seq.links[index - 1].hash if index else root_hash(seq.tenant, seq.adapter)
