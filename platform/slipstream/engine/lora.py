"""LoRA weights of the resident adapters, and how the rows of a step get them.

Adapters of similar rank lie side by side in a `RankStack`, so that one batched GEMM shrinks the rows of all of them and
another expands them again. Rows of one adapter are consecutive and every adapter multiplies its own rows alone, whatever the
number of adapters. (Measured on two AVX2 cores, SmolLM2-135M, rank 16 on all linears, 32 rows of 8 adapters: 15 ms, where one
stacked GEMM with the other adapters' columns masked took 42 ms; 128 rows of 32 adapters: 42 and 339 ms.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from slipstream.adapters.weights import AdapterWeights, LoraModule
from slipstream.engine.linear import LinearGroup, RowAdapters, RowContext

SMALLEST_RANK = 8  # stacks have ranks 8, 16, 32 …: an adapter is padded to less than twice its own
FEW_ROWS = 8  # adapters with at most this many rows share a tile, the others with those within a factor of two
MAX_WASTE = 2  # a tile of more rows than that may be padded to at most this many times its own
LAYOUTS_KEPT = 8


@dataclass(frozen=True, slots=True)
class PreparedModule:
    """One adapter's part of one target, ready for the bank. a: [in, r]; b: [r, out] with the scale folded in;
    gain: [out] = DoRA's m / ||W + sBA||, float32, or None."""

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [self.a, self.b, *([self.gain] if self.gain is not None else [])]

    def to(self, device: torch.device) -> PreparedModule:
        """The same on a device; nothing is copied when it is there already."""
        return PreparedModule(
            self.a.to(device), self.b.to(device), self.gain.to(device) if self.gain is not None else None
        )


@dataclass(frozen=True, slots=True)
class PreparedLora:
    """An adapter's LoRA in the engine's dtype."""

    modules: Mapping[str, PreparedModule]
    rank: int  # largest over the modules; 0 for an adapter without


@dataclass(slots=True)
class _GroupPart:
    """A stack's weights for one group of k siblings. shrink: [P, in, k * R]; expand: [P, R, out] for each member that any
    adapter here has, gains: [P, out] float32 for each that has DoRA, 1 where an adapter has none."""

    shrink: torch.Tensor
    expand: list[torch.Tensor | None]
    gains: list[torch.Tensor | None]

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.shrink, *self.expand, *self.gains) if t is not None]


class RankStack:
    """Adapters padded to rank R, in P places. An adapter that comes overwrites one that was not used for long."""

    def __init__(self, groups: Mapping[str, LinearGroup], rank: int, like: torch.Tensor) -> None:
        self.rank = rank
        self.parts: dict[str, _GroupPart] = {}
        self._groups = groups
        self._like = like
        self._slots: list[int | None] = []  # the adapter slot in each place
        self._used: list[int] = []  # when each place was last asked for
        self._clock = 0

    def place_of(self, slot: int) -> int:
        """Where an adapter lies."""
        return self._slots.index(slot)

    @property
    def is_empty(self) -> bool:
        """Whether no adapter is left."""
        return not any(slot is not None for slot in self._slots)

    def hold(self, loras: Mapping[int, PreparedLora]) -> bool:
        """Give these adapters (by slot) places close together; whether any had to move."""
        self._clock += 1
        moved = False
        for slot in loras:
            if slot in self._slots:
                self._used[self.place_of(slot)] = self._clock
        for slot, lora in loras.items():
            if slot not in self._slots:
                self._write(self._free_place(loras), slot, lora)
                moved = True
        return self._close_ranks(loras) or moved

    def drop(self, slot: int) -> None:
        """Forget an adapter; its place is the next to be taken."""
        if slot in self._slots:
            place = self.place_of(slot)
            self._slots[place], self._used[place] = None, 0

    def _free_place(self, wanted: Mapping[int, PreparedLora]) -> int:
        """The place that was used longest ago by an adapter that is not wanted now."""
        free = [p for p, slot in enumerate(self._slots) if slot not in wanted]
        if not free:
            self._grow(max(1, 2 * len(self._slots)))
            return self._free_place(wanted)
        return min(free, key=lambda place: self._used[place])

    def _close_ranks(self, loras: Mapping[int, PreparedLora]) -> bool:
        """Adapters far apart make a tile that reads all in between: move one of them closer, one a step."""
        places = sorted(self.place_of(slot) for slot in loras)
        if places[-1] - places[0] < MAX_WASTE * len(places):
            return False
        gap = next(p for p in range(places[0], places[-1]) if p not in places)
        slot = self._slots[places[-1]]
        assert slot is not None
        self.drop(slot)
        self._write(gap, slot, loras[slot])
        return True

    def _grow(self, places: int) -> None:
        more = places - len(self._slots)
        self._slots += [None] * more
        self._used += [0] * more
        for part in self.parts.values():
            part.shrink = _longer(part.shrink, more, 0.0)
            part.expand = [_longer(t, more, 0.0) if t is not None else None for t in part.expand]
            part.gains = [_longer(t, more, 1.0) if t is not None else None for t in part.gains]

    def _write(self, place: int, slot: int, lora: PreparedLora) -> None:
        self._slots[place], self._used[place] = slot, self._clock
        for key, group in self._groups.items():
            modules = [lora.modules.get(name) for name in group.names]
            part = self.parts.get(key)
            if part is None:
                if not any(modules):
                    continue
                part = self._new_part(group)
                self.parts[key] = part
            part.shrink[place].zero_()
            for m, module in enumerate(modules):
                self._write_member(part, m, place, module, group.sizes[m])

    def _new_part(self, group: LinearGroup) -> _GroupPart:
        k = len(group.names)
        shrink = self._like.new_zeros(len(self._slots), group.in_features, k * self.rank)
        return _GroupPart(shrink, [None] * k, [None] * k)

    def _write_member(self, part: _GroupPart, m: int, place: int, module: PreparedModule | None, out: int) -> None:
        expand, gains = part.expand[m], part.gains[m]
        if expand is None and module is not None:
            expand = part.expand[m] = self._like.new_zeros(len(self._slots), self.rank, out)
        if gains is None and module is not None and module.gain is not None:
            gains = part.gains[m] = torch.ones(len(self._slots), out, device=self._like.device)
        if expand is not None:
            expand[place].zero_()
        if gains is not None:
            gains[place] = module.gain if module is not None and module.gain is not None else 1.0
        if module is not None and expand is not None:
            rank = module.a.shape[1]
            part.shrink[place, :, m * self.rank : m * self.rank + rank] = module.a
            expand[place, :rank] = module.b


def _longer(tensor: torch.Tensor, more: int, fill: float) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_full((more, *tensor.shape[1:]), fill)])


@dataclass(frozen=True, slots=True)
class StackTile:
    """Rows start … stop of adapters of one stack, `width` rows an adapter after padding.

    gather: int64 [count * width], row (from `start`) of each padded place; scatter: int64 [stop - start], padded place of
    each row; both None where the rows lie as the places do. row_places: int64 [stop - start], place in the stack, for DoRA.
    """

    stack: RankStack
    first: int
    count: int
    width: int
    start: int
    stop: int
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    row_places: torch.Tensor

    def apply_(self, group: LinearGroup, x: torch.Tensor, y: torch.Tensor) -> None:
        """y += x A B on these rows (then DoRA's gain)."""
        part = self.stack.parts.get(group.key)
        if part is None:
            return
        x, y = x[self.start : self.stop], y[self.start : self.stop]
        if self.gather is not None:
            x = x.index_select(0, self.gather)
        places, rank = slice(self.first, self.first + self.count), self.stack.rank
        shrunk = torch.bmm(x.view(self.count, self.width, -1), part.shrink[places])
        for m, out in enumerate(group.split(y)):
            expand, gains = part.expand[m], part.gains[m]
            if expand is None:
                continue
            delta = torch.bmm(shrunk[:, :, m * rank : (m + 1) * rank], expand[places]).view(self.count * self.width, -1)
            out.add_(delta if self.scatter is None else delta.index_select(0, self.scatter))
            if gains is not None:
                finish_dora_(out, gains[self.row_places], _bias_of(group, m))


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows start … stop of one adapter, module by module: what `StackTile` must agree with."""

    lora: PreparedLora
    start: int
    stop: int

    def apply_(self, group: LinearGroup, x: torch.Tensor, y: torch.Tensor) -> None:
        """y += x A B on these rows (then DoRA's gain)."""
        rows = slice(self.start, self.stop)
        for m, out in enumerate(group.split(y)):
            module = self.lora.modules.get(group.names[m])
            if module is not None:
                out[rows].add_(x[rows] @ module.a @ module.b)
                if module.gain is not None:
                    finish_dora_(out[rows], module.gain, _bias_of(group, m))


def _bias_of(group: LinearGroup, member: int) -> torch.Tensor | None:
    return group.split(group.base.bias)[member] if group.base.bias is not None else None


def finish_dora_(out: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None) -> None:
    """DoRA (arXiv 2402.09353): y = g (W x + s B A x) + bias, in place; rows without (gain 1) keep their bits."""
    shift = bias.float() if bias is not None else 0.0
    scaled = ((out.float() - shift) * gain + shift).to(out.dtype)
    out.copy_(torch.where(gain == 1.0, out, scaled))


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
        self, groups: Mapping[str, LinearGroup], rows: RowContext, like: torch.Tensor, grouped: bool = True
    ) -> None:
        """`like` gives dtype and device; `grouped` False serves each adapter by itself: slower, and the reference."""
        self._member_of = {name: (g, i) for g in groups.values() for i, name in enumerate(g.names)}
        self._groups = groups
        self._rows = rows
        self._like = like
        self._grouped = grouped
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
            gain = None
            if module.magnitude is not None:
                on_device = LoraModule(module.a.to(self._like), module.b.to(self._like), module.scale, module.magnitude)
                gain = module.magnitude.float() / group.member_norms(member, on_device).cpu()
            a, b = module.a.t().to(host).contiguous(), (module.b.float() * module.scale).t().to(host).contiguous()
            prepared = PreparedModule(a, b, gain)
            if not all(bool(t.isfinite().all()) for t in prepared.tensors()):
                raise ValueError(f"{name}: weights overflow in {host.dtype}")
            modules[name] = prepared
        return PreparedLora(modules, max((m.a.shape[1] for m in modules.values()), default=0))

    def blank(self, rank: int, without: str) -> PreparedLora:
        """A LoRA of zeros on every linear but one: costs what a real one costs."""
        modules = {}
        for name, (group, member) in self._member_of.items():
            if name != without:
                a = self._like.new_zeros(group.in_features, rank)
                modules[name] = PreparedModule(a, self._like.new_zeros(rank, group.sizes[member]), None)
        return PreparedLora(modules, rank)

    def load(self, slot: int, lora: PreparedLora) -> None:
        """Put an adapter into a free slot: host → device."""
        assert slot not in self._loras
        device = self._like.device
        self._loras[slot] = PreparedLora({name: m.to(device) for name, m in lora.modules.items()}, lora.rank)
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

        return sorted(range(len(slots)), key=key) if self._grouped else list(range(len(slots)))

    def use(self, slots: Sequence[int]) -> None:
        """Set the rows' adapters for the next calls. slots: one for each row, -1 = base."""
        layout = tuple(slots)
        found = self._layouts.get(layout)
        if found is None:
            self._hold(dict.fromkeys(slots, 1))  # may clear the layouts
            found = tuple(self._lay_out(layout))
            if len(self._layouts) >= LAYOUTS_KEPT:
                self._layouts.clear()
            self._layouts[layout] = found
        self._rows.adapters = found

    def _is_plain(self, slot: int) -> bool:
        return slot < 0 or self._loras[slot].rank == 0

    def _stack(self, slot: int) -> RankStack:
        rank = SMALLEST_RANK
        while rank < self._loras[slot].rank:
            rank *= 2
        if rank not in self._stacks:
            self._stacks[rank] = RankStack(self._groups, rank, self._like)
        return self._stacks[rank]

    def _hold(self, slots: Iterable[int]) -> None:
        """Places for the adapters of a step."""
        if not self._grouped:
            return
        by_stack: dict[int, dict[int, PreparedLora]] = {}
        for slot in slots:
            if not self._is_plain(slot):
                by_stack.setdefault(self._stack(slot).rank, {})[slot] = self._loras[slot]
        for rank, loras in by_stack.items():
            if self._stacks[rank].hold(loras):
                self._layouts.clear()

    def _lay_out(self, slots: tuple[int, ...]) -> Iterable[RowAdapters]:
        tile: list[_Run] = []
        start = 0
        for slot, group in groupby(slots):
            count = len(list(group))
            if self._is_plain(slot):
                pass
            elif not self._grouped:
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
