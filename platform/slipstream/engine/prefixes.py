"""Which blocks of a sequence others may reuse: the prefix cache, seen from a sequence. Pure Python."""

from __future__ import annotations

from slipstream.engine.blocks import BlockPool, chain_hash, root_hash
from slipstream.engine.sequence import Sequence


def reusable_hashes(seq: Sequence, block_size: int) -> list[bytes]:
    """Hashes of the full blocks that may be reused: never all tokens, since the last one's logits are needed."""
    usable = (len(seq.tokens) - 1) // block_size
    _extend(seq, usable, block_size)
    return seq.hashes[:usable]


def publish(seq: Sequence, pool: BlockPool) -> None:
    """Make full blocks of committed tokens findable; drafts never are."""
    full = seq.num_computed // pool.block_size
    _extend(seq, full, pool.block_size)
    for i in range(seq.num_published, full):
        pool.publish(seq.blocks[i], seq.hashes[i])
    seq.num_published = max(seq.num_published, full)


def _extend(seq: Sequence, count: int, size: int) -> None:
    while len(seq.hashes) < count:
        i = len(seq.hashes)
        parent = seq.hashes[-1] if i else root_hash(seq.tenant, seq.adapter)
        seq.hashes.append(chain_hash(parent, seq.tokens[i * size : (i + 1) * size]))
