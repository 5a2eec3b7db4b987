"""The LM head's best token of each row, exactly, from a copy of its weights in 8 bits.

In 8 bits a head is half the bytes and half the arithmetic, and a Turbo LoRA's step needs it twice. The error of a logit is at
most |w - w'| |h| + |w'| |h - h'| (Cauchy-Schwarz), and these lengths are known: so is which ids may have the largest logit.
They are few, and those are scored in float32 with the head's own weights.
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional as F

from slipstream.engine.finite import are_finite
from slipstream.engine.memory import HugePages
from slipstream.engine.native.build import library
from slipstream.engine.native.ops import LANES
from slipstream.engine.native.weights import PANEL
from slipstream.engine.plan import Pick

_ROUNDED_AT_ONCE = 128 * PANEL  # outputs
SCRATCH_BYTES = 16 << 20  # of all rows that are computed together; malloc keeps as much


class _Filter(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "step", "sums", "lost", "length", "exact")),
        ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64),
    )  # fmt: skip


class GreedyHead:
    """One LM head in bfloat16. weight: [V, H], which must stay as it is."""

    def __init__(self, weight: torch.Tensor) -> None:
        found = library()
        assert found is not None
        outputs, inputs = weight.shape
        spare = -outputs % PANEL
        panels = (outputs + spare) // PANEL
        pages = HugePages(panels * PANEL * inputs)
        self._panels = pages.zeros(panels, inputs // 4, PANEL, 4, dtype=torch.int8)
        # By output: its step, what the kernel takes off its sums, and the lengths of what rounding took and left, which are
        # found in steps: the squares of weights may be too large or too small for a float.
        self._step, self._lost, self._length = torch.zeros(3, outputs + spare)
        self._sums = torch.zeros(outputs + spare, dtype=torch.int32)
        for first in range(0, outputs, _ROUNDED_AT_ONCE):
            self._round(weight[first : first + _ROUNDED_AT_ONCE].float(), first)
        self._weight = weight
        self._filter = _Filter(
            *(t.data_ptr() for t in (self._panels, self._step, self._sums, self._lost, self._length, weight)),
            outputs,
            inputs,
        )
        self._best_ids = found.slipstream_best_ids_bf16
        self._row_bytes: int = found.slipstream_filter_bytes(ctypes.addressof(self._filter), 1)
        self._rows_at_once = max(1, SCRATCH_BYTES // self._row_bytes)

    def _round(self, wide: torch.Tensor, first: int) -> None:
        """Some rows of the weight, from row `first`, which is a panel's."""
        count, inputs = wide.shape
        own = slice(first, first + count)
        step = wide.abs().amax(dim=1).clamp_min(1e-30) / 127
        steps = wide / step.unsqueeze(1)
        rounded = steps.round()
        self._step[own] = step
        self._sums[own] = 128 * rounded.sum(dim=1).int()
        self._lost[own] = 1.0001 * step * (steps - rounded).norm(dim=1)  # a little more, for what float32 itself rounds
        self._length[own] = 1.0001 * step * rounded.norm(dim=1)
        padded = F.pad(rounded.to(torch.int8), (0, 0, 0, -count % PANEL))
        self._panels[first // PANEL :][: padded.shape[0] // PANEL] = padded.view(-1, PANEL, inputs // 4, 4).transpose(
            1, 2
        )

    def __call__(self, hidden: torch.Tensor) -> list[Pick | None]:
        """The id of the largest logit of each row of hidden [m, H], the first among equals; None for a row where hardly any
        id can be left out or that is not all numbers. Margins are as the 8 bits have them."""
        found: list[int] = []
        margins: list[float] = []
        for first in range(0, hidden.shape[0], self._rows_at_once):
            rows = hidden[first : first + self._rows_at_once].contiguous()
            count = rows.shape[0]
            scratch = torch.empty(count * self._row_bytes, dtype=torch.uint8)
            ids, ahead = torch.empty(count, dtype=torch.int64), torch.empty(count)
            outputs = ids.data_ptr(), ahead.data_ptr()
            self._best_ids(*outputs, ctypes.addressof(self._filter), rows.data_ptr(), count, scratch.data_ptr())
            found += ids.tolist()
            margins += ahead.tolist()
        return [Pick(*pick) if pick[0] >= 0 else None for pick in zip(found, margins, strict=True)]


def greedy_head(weight: torch.Tensor) -> GreedyHead | None:
    """For a head that it serves: bfloat16 in memory, all of it numbers, on processors with AVX512-VNNI."""
    found = library()
    if found is None or not found.slipstream_has_filter() or weight.dtype != torch.bfloat16:
        return None
    served = weight.shape[1] % LANES == 0 and weight.is_contiguous() and are_finite([weight])
    return GreedyHead(weight) if served else None
