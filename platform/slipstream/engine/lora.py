"""LoRA weights of the resident adapters, and which rows of a step get which.

Adapters of similar rank lie side by side in a `RankStack` (`stacks.py`); rows are ordered and cut so that few, large products
serve all of them: a C++ kernel on processors (`native/`), Triton kernels on GPUs (`triton_lora.py`), batched GEMMs
(`StackTile`) where there is neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

import torch

from slipstream.adapters.weights import AdapterWeights, LoraModule
from slipstream.engine.finite import are_finite
from slipstream.engine.linear import LinearGroup, RowAdapters, RowContext
from slipstream.engine.stacks import (
    Plain,
    PlainRows,
    PreparedLora,
    PreparedModule,
    RankStack,
    StackLayout,
    StackTile,
    norms,
)

SMALLEST_RANK = (
    8  # stacks have ranks 8 (16 where kernels want whole vectors), 16, 32 …: an adapter is padded to less than
)
# twice its own
WHOLE_VECTOR = 16  # what a C++ kernel works on at a time
FEW_ROWS = 8  # adapters with at most this many rows share a tile, the others with those within a factor of two
MAX_WASTE = 2  # a tile of more rows than that may be padded to at most this many times its own
LAYOUTS_KEPT = 8


class LoraKernels(StrEnum):
    """How rows get their adapters. No text depends on it, beyond rounding."""

    PLAIN = "plain"  # each adapter by itself: slow, and the reference
    BATCHED = "batched"  # all adapters of a rank in one batched GEMM
    NATIVE = "native"  # one call of a C++ kernel a group, for processors
    TRITON = "triton"  # two kernel launches a projection, for GPUs

    @property
    def from_anywhere(self) -> bool:
        """Whether one call takes any mix of a stack's adapters."""
        return self in {LoraKernels.TRITON, LoraKernels.NATIVE}


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive rows of one adapter."""

    slot: int
    place: int
    start: int
    count: int


class AdapterBank:
    """LoRA weights of the resident adapters, by slot, and the stacks of those in use. Owned by the runner."""

    def __init__(
        self,
        groups: Mapping[str, LinearGroup],
        rows: RowContext,
        like: torch.Tensor,
        kernels: LoraKernels = LoraKernels.BATCHED,
    ) -> None:
        """`like` gives dtype and device."""
        if kernels is LoraKernels.NATIVE and any(g.lora.group.size > 1 for g in groups.values()):
            kernels = (
                LoraKernels.BATCHED
            )  # the C++ kernel expands in the call that shrinks: ranks could not meet between
        self._member_of = {name: (g, i) for g in groups.values() for i, name in enumerate(g.names)}
        self._groups = groups
        self._rows = rows
        self._like = like
        self._kernels = kernels
        self._stack_layout: StackLayout = Plain()
        if kernels is LoraKernels.NATIVE:
            from slipstream.engine.native.weights import Panels  # noqa: PLC0415  # only where they were built

            self._stack_layout = Panels.of(like.dtype, all(g.in_features % 2 == 0 for g in groups.values()))
        self._loras: dict[int, PreparedLora] = {}
        self._stacks: dict[int, RankStack] = {}
        self._layouts: dict[tuple[int, ...], tuple[RowAdapters, ...]] = {}  # slots of a call → its tiles

    def prepare(self, weights: AdapterWeights) -> PreparedLora:
        """Check, scale and cast one adapter's LoRA, in host memory. Touches nothing shared: may run beside the step loop.

        Raises `ValueError` when it does not fit this base model or overflows in the engine's dtype.
        """
        host = self._like.cpu()
        modules = {}
        for name, module in weights.lora.items():
            group, member = self._member_of[name]
            if module.a.shape[1] != group.in_features or module.b.shape[0] != group.sizes[member]:
                raise ValueError(f"{name}: LoRA shapes do not fit this base model")
            gain = square = None
            if module.magnitude is not None:
                on_device = LoraModule(module.a.to(self._like), module.b.to(self._like), module.scale, module.magnitude)
                gain, square = module.magnitude.float(), group.member_squares(member, on_device).cpu()
                if group.sum_over is None:
                    gain, square = gain / norms(square), None
            # Few operations: each takes turns with the step loop.
            a, b = host.new_empty(module.a.shape[::-1]), host.new_empty(module.b.shape[::-1])
            a.copy_(module.a.t())
            torch.mul(module.b.t().float() if module.b.dtype != host.dtype else module.b.t(), module.scale, out=b)
            modules[name] = PreparedModule(*group.lora.cut(a, b), gain, square)
        if not are_finite(tensor for module in modules.values() for tensor in module.tensors()):
            broken = next(name for name, module in modules.items() if not are_finite(module.tensors()))
            raise ValueError(f"{broken}: weights overflow in {host.dtype}")
        return PreparedLora(modules, max((m.a.shape[0] for m in weights.lora.values()), default=0))

    def blank(self, rank: int, without: str) -> PreparedLora:
        """A LoRA of zeros on every linear but one: costs what a real one costs."""
        modules = {}
        for name, (group, member) in self._member_of.items():
            if name != without:
                a, b = self._like.new_zeros(group.in_features, rank), self._like.new_zeros(rank, group.sizes[member])
                modules[name] = PreparedModule(*group.lora.cut(a, b), None)
        return PreparedLora(modules, rank)

    def load(self, slot: int, lora: PreparedLora) -> None:
        """Put an adapter into a free slot: host → device. Ranks of a group do it together."""
        assert slot not in self._loras
        modules = {}
        for name, module in lora.to(self._like.device).modules.items():
            group = self._member_of[name][0].sum_over
            modules[name] = module.met(group) if group is not None else module
        self._loras[slot] = PreparedLora(modules, lora.rank)
        self._layouts.clear()

    def unload(self, slot: int) -> None:
        """Empty a slot."""
        del self._loras[slot]
        for stack in self._stacks.values():
            stack.drop(slot)
        self._stacks = {rank: stack for rank, stack in self._stacks.items() if not stack.is_empty}
        self._layouts.clear()

    def targets(self, slot: int, name: str) -> PreparedModule | None:
        """The adapter's part of a module, if it has one."""
        lora = self._loras.get(slot)
        return lora.modules.get(name) if lora else None

    def order(self, slots: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Indices of runs of rows (an adapter slot and a number of rows each), in the order that makes the fewest tiles."""
        total: dict[int, int] = {}
        for slot, count in zip(slots, counts, strict=True):
            total[slot] = total.get(slot, 0) + count
        self._hold(total)

        def key(i: int) -> tuple[int, int, int]:
            slot = slots[i]
            if self._is_plain(slot):
                return -1, 0, slot
            stack = self._stack(slot)
            return stack.rank, _row_class(total[slot]), stack.place_of(slot)

        return list(range(len(slots))) if self._kernels is LoraKernels.PLAIN else sorted(range(len(slots)), key=key)

    def use(self, slots: Sequence[int]) -> None:
        """Set the rows' adapters for the next calls. slots: one for each row, -1 = base."""
        layout = tuple(slots)
        found = self._layouts.get(layout)
        if found is None:
            self._hold(dict.fromkeys(slots, 1))  # may clear the layouts
            by = self._by_stack if self._kernels.from_anywhere else self._lay_out
            found = tuple(by(layout))
            if len(self._layouts) >= LAYOUTS_KEPT:
                self._layouts.clear()
            self._layouts[layout] = found
        self._rows.adapters = found

    def _is_plain(self, slot: int) -> bool:
        return slot < 0 or self._loras[slot].rank == 0

    def _stack(self, slot: int) -> RankStack:
        rank = SMALLEST_RANK if self._kernels is not LoraKernels.NATIVE else WHOLE_VECTOR
        while rank < self._loras[slot].rank:
            rank *= 2
        if rank not in self._stacks:
            self._stacks[rank] = RankStack(
                self._groups, rank, self._like, self._stack_layout, anywhere=self._kernels.from_anywhere
            )
        return self._stacks[rank]

    def _hold(self, slots: Iterable[int]) -> None:
        """Places for the adapters of a step."""
        if self._kernels is LoraKernels.PLAIN:
            return
        by_stack: dict[int, dict[int, PreparedLora]] = {}
        for slot in slots:
            if not self._is_plain(slot):
                by_stack.setdefault(self._stack(slot).rank, {})[slot] = self._loras[slot]
        for rank, loras in by_stack.items():
            if self._stacks[rank].hold(loras):
                self._layouts.clear()

    def _by_stack(self, slots: tuple[int, ...]) -> Iterable[RowAdapters]:
        """All rows of a stack at once, for kernels that take any mix of its adapters."""
        stacks = dict.fromkeys(self._stack(slot) for slot in slots if not self._is_plain(slot))
        for stack in stacks:
            here = {
                slot: stack.place_of(slot)
                for slot in set(slots)
                if not self._is_plain(slot) and self._stack(slot) is stack
            }
            places = [here.get(slot, -1) for slot in slots]
            if self._kernels is LoraKernels.NATIVE:
                from slipstream.engine.native.ops import NativeRows  # noqa: PLC0415  # only where they were built

                yield NativeRows.of(stack, places)
            else:
                from slipstream.engine.triton_lora import TritonRows  # noqa: PLC0415  # only where Triton is installed

                yield TritonRows.of(stack, places, self._like.device)

    def _lay_out(self, slots: tuple[int, ...]) -> Iterable[RowAdapters]:
        tile: list[_Run] = []
        start = 0
        for slot, group in groupby(slots):
            count = len(list(group))
            if self._is_plain(slot):
                pass
            elif self._kernels is LoraKernels.PLAIN:
                yield PlainRows(self._loras[slot], start, start + count)
            else:
                run = _Run(slot, self._stack(slot).place_of(slot), start, count)
                if tile and not self._joins(tile, run):
                    yield self._tile(tile)
                    tile = []
                tile.append(run)
            start += count
        if tile:
            yield self._tile(tile)

    def _joins(self, tile: list[_Run], run: _Run) -> bool:
        """Whether rows may be computed with those before them: next to them, same rank, and not too much padding."""
        last = tile[-1]
        if last.start + last.count != run.start or self._stack(last.slot) is not self._stack(run.slot):
            return False
        if run.slot in {r.slot for r in tile} or _row_class(last.count) != _row_class(run.count):
            return False
        runs = [*tile, run]
        return max(r.count for r in runs) <= FEW_ROWS or _padded(runs) <= MAX_WASTE * sum(r.count for r in runs)

    def _tile(self, runs: list[_Run]) -> StackTile:
        first, width = min(r.place for r in runs), max(r.count for r in runs)
        start, stop = runs[0].start, runs[-1].start + runs[-1].count
        count = _padded(runs) // width
        gather, scatter, places = [0] * (count * width), [0] * (stop - start), [0] * (stop - start)
        for run in runs:
            for j in range(run.count):
                row, padded = run.start - start + j, (run.place - first) * width + j
                gather[padded], scatter[row], places[row] = row, padded, run.place
        straight = gather == list(range(stop - start))

        def index(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, device=self._like.device)

        return StackTile(
            self._stack(runs[0].slot), first, count, width, start, stop,
            None if straight else index(gather), None if straight else index(scatter), index(places),
        )  # fmt: skip


def _row_class(count: int) -> int:
    """Numbers of rows that may be padded to each other."""
    return max(FEW_ROWS - 1, count - 1).bit_length()


def _padded(runs: Sequence[_Run]) -> int:
    """Rows of a tile: every place from the first to the last, padded to the most rows."""
    places = [r.place for r in runs]
    return (max(places) - min(places) + 1) * max(r.count for r in runs)
