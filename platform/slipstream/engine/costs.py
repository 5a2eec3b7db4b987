"""What rows cost: the steps that are timed at start-up, for `goodput.py`."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Sequence

import torch

from slipstream.engine.attention import KVCache
from slipstream.engine.loader import PROBE
from slipstream.engine.plan import PlannedSequence
from slipstream.protocol import SamplingParams

COST_CONTEXT = 128  # tokens that a row looks at while costs are measured
COST_ADAPTERS = 8  # among which its rows are divided …
COST_RANK = 16  # … and the rank of each, on every linear
COST_STREAM_RANK = 128  # of their streams
COST_IDS = 1024  # of a draft vocabulary
COST_ROWS = 128  # beyond, costs go on as they did
COST_RUNS = 4
GREEDY = SamplingParams(temperature=0.0)


def row_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, … up to `most` rows, or what is measured at the most."""
    counts = [1]
    while counts[-1] < min(most, COST_ROWS) or len(counts) < 2:
        counts.append(2 * counts[-1])
    return tuple(counts)


def cost_parts(rows: int, group: int, cache: KVCache) -> list[PlannedSequence]:
    """Sequences of `group` rows (or one of fewer) with as many streams, the same adapter's together."""
    tokens = PROBE[: min(rows, group)]
    context = max(len(tokens), min(COST_CONTEXT, cache.num_blocks * cache.block_size))
    count, start, sequences = -(-context // cache.block_size), context - len(tokens), rows // len(tokens)
    parts = []
    for i in range(sequences):
        slot = i * min(COST_ADAPTERS, sequences) // sequences
        first = i * count % (cache.num_blocks - count + 1)
        blocks = tuple(range(first, first + count))
        drafts = len(tokens) - 1
        parts.append(PlannedSequence(i, tokens, start, blocks, True, drafts, slot, GREEDY, 0, draft_next=len(tokens)))
    return parts


def cost_vocabulary(slot: int, vocab_size: int) -> array[int]:
    """An adapter's draft vocabulary: ids from all over."""
    return array("i", range(slot % vocab_size, vocab_size, max(1, vocab_size // COST_IDS)))


def best_times(works: Sequence[Sequence[Callable[[], object]]], device: torch.device) -> list[tuple[float, ...]]:
    """Seconds of each, the best of a few, in turns: a busy neighbour then disturbs one turn of many, not all of one."""
    best = [[math.inf] * len(each) for each in works]
    for _ in range(COST_RUNS):
        for times, each in zip(best, works, strict=True):
            for i, work in enumerate(each):
                began = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times[i] = min(times[i], time.perf_counter() - began)
    return [tuple(times) for times in best]
