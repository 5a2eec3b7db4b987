"""Linears that serve the base and many adapters in one call: a slot bank of LoRA weights over shared base GEMMs.

Sibling projections that read the same input (q/k/v, gate/up) run as one base GEMM and one shrink GEMM. The adapters of a
step are stacked side by side: one shrink over all their rows, other adapters' columns masked per token, one expand per
target (measured six times faster on CPU than a loop over adapters). A token of the base model has an all-zero mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from slipstream.adapters.weights import AdapterWeights, LoraModule

FUSED_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
STACKS_KEPT = 3  # built stacks are reused while a step's adapters are among theirs …
STACK_SLACK = 2.0  # … and they have at most this many times the rank columns the step needs
STACK_ROOM = 1.5  # a new stack takes recently used adapters along up to this many times the columns it must have


class PackedWeight:
    """A base weight [out, in] and its bias, prepacked for oneDNN where that pays (bfloat16 on CPU)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = bias
        self.row_norms_sq = weight.float().square().sum(dim=1)  # [out], for DoRA
        self._weight = pack(weight)

    def __call__(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """x: [n, in] → [n, out]."""
        return packed_linear(x, self._weight, self.bias if with_bias else None)


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether oneDNN's packed GEMM serves this weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] prepacked where that pays, else as it is. Packed, it is of use to `packed_linear` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight) if can_prepack(weight) else weight


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x: [n, in] → [n, out]; `weight` is what `pack` gave."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


@dataclass(frozen=True, slots=True)
class PreparedModule:
    """One adapter's part of one target, ready for the bank. a: [r, in]; b: [out, r] with the scale folded in;
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
    rank: int  # largest over the modules; smaller ones are padded with zero rows in the stack


@dataclass(slots=True)
class _GroupStack:
    """The stacked adapters of one group. shrink: [members * R, in]; expand: [out_m, R] or None for each member."""

    shrink: torch.Tensor
    expand: list[torch.Tensor | None]
    gains: list[torch.Tensor | None]  # [stacked + 1, out_m] float32, last row = base


@dataclass(slots=True)
class Stack:
    """The adapters a step may use, side by side."""

    slots: tuple[int, ...]
    rank: int  # R: sum of the adapters' ranks
    columns: torch.Tensor  # bool [max_slots + 1, R]: columns of each slot; last row (slot -1) all False
    index: torch.Tensor  # int64 [max_slots + 1]: place of each slot in `slots`; slot -1 → len(slots)
    groups: dict[str, _GroupStack] = field(default_factory=dict)


@dataclass(slots=True)
class RowContext:
    """Which adapter each row of the current call belongs to; written by the runner before it calls the model."""

    stack: Stack | None = None
    hidden: torch.Tensor | None = None  # bool [n, R]: columns of other adapters; None = every row uses every column
    place: torch.Tensor | None = None  # int64 [n], row of the gain tables


class LinearGroup:
    """One or more sibling projections with the same input."""

    def __init__(self, names: Sequence[str], linears: Sequence[nn.Linear], rows: RowContext) -> None:
        self.names = tuple(names)
        self.sizes = [linear.out_features for linear in linears]
        self.in_features = linears[0].in_features
        weight = torch.cat([linear.weight.data for linear in linears])
        biases = [linear.bias.data if linear.bias is not None else None for linear in linears]
        bias = None
        if any(b is not None for b in biases):
            zeros = (weight.new_zeros(size) for size in self.sizes)
            bias = torch.cat([b if b is not None else z for b, z in zip(biases, zeros, strict=True)])
        self.base = PackedWeight(weight, bias)
        self._rows = rows
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []
        self._left = 0

    @property
    def key(self) -> str:
        """Name of the group: its first member's."""
        return self.names[0]

    def output(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """The member's projection of x [..., in]. All members are computed when the first asks, and kept for the rest."""
        if self._input is not x:
            flat = x.reshape(-1, self.in_features)
            self._outputs = [y.view(*x.shape[:-1], -1) for y in self._compute(flat)]
            self._input = x
            self._left = len(self.names)
        out = self._outputs[member]
        self._left -= 1
        if self._left <= 0:
            self._input = None
            self._outputs = []
        return out

    def _compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        stack = self._rows.stack
        part = stack.groups.get(self.key) if stack is not None else None
        if stack is None or part is None:
            return list(torch.split(self.base(x), self.sizes, dim=-1))
        outs = list(torch.split(self.base(x), self.sizes, dim=-1))
        shrunk = F.linear(x, part.shrink).view(x.shape[0], len(self.names), stack.rank)
        if self._rows.hidden is not None:
            # Overwritten, not multiplied by zero: another tenant's overflow would come through as inf * 0.
            shrunk = shrunk.masked_fill(self._rows.hidden.unsqueeze(1), 0.0)
        for m, expand in enumerate(part.expand):
            if expand is not None:
                outs[m] = torch.addmm(outs[m], shrunk[:, m], expand.t())
        return self._finish_dora(outs, part) if any(g is not None for g in part.gains) else outs

    def _finish_dora(self, outs: list[torch.Tensor], part: _GroupStack) -> list[torch.Tensor]:
        """DoRA (arXiv 2402.09353): y = g (W x + s B A x) + bias; rows without keep their bits."""
        assert self._rows.place is not None
        biases = torch.split(self.base.bias, self.sizes) if self.base.bias is not None else [None] * len(outs)
        done = []
        for out, gains, bias in zip(outs, part.gains, biases, strict=True):
            if gains is None:
                done.append(out)
                continue
            gain = gains[self._rows.place]
            shift = bias.float() if bias is not None else 0.0
            scaled = ((out.float() - shift) * gain + shift).to(out.dtype)
            done.append(torch.where(gain == 1.0, out, scaled))
        return done

    def member_norms(self, member: int, module: LoraModule) -> torch.Tensor:
        """||W + sBA|| of each output row, float32 [out], from GEMMs with W alone:
        ||W||² + 2s Σ_r B ∘ (W Aᵀ) + s² diag(B A Aᵀ Bᵀ). W itself is packed and cannot be read back."""
        start = sum(self.sizes[:member])
        rows = slice(start, start + self.sizes[member])
        dtype = self.base.bias.dtype if self.base.bias is not None else module.a.dtype
        a, b = module.a.float(), module.b.float() * module.scale
        wa = self.base(module.a.to(dtype), with_bias=False)[:, rows].float().t()  # [out, r]
        square = self.base.row_norms_sq[rows] + 2 * (b * wa).sum(1) + (b @ (a @ a.t()) * b).sum(1)
        return square.clamp_min(0).sqrt()


class GroupMember(nn.Module):
    """Stands where an `nn.Linear` stood."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self._group = group
        self._member = member
        self.in_features = group.in_features
        self.out_features = group.sizes[member]
        bias = group.base.bias
        self.bias = torch.split(bias, group.sizes)[member] if bias is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] → [..., out], adapters applied per row."""
        return self._group.output(self._member, x)


def swap_linears(model: nn.Module, rows: RowContext) -> dict[str, LinearGroup]:
    """Replace every `nn.Linear` below `model` by members of groups; returns the groups by their key."""
    groups: dict[str, LinearGroup] = {}
    for parent_name, parent in list(model.named_modules()):
        linears = {n: c for n, c in parent.named_children() if type(c) is nn.Linear}
        for names in _grouping(linears):
            full = [f"{parent_name}.{n}" if parent_name else n for n in names]
            group = LinearGroup(full, [linears[n] for n in names], rows)
            groups[group.key] = group
            for i, name in enumerate(names):
                setattr(parent, name, GroupMember(group, i))
    return groups


def _grouping(linears: Mapping[str, nn.Linear]) -> Iterable[tuple[str, ...]]:
    left = dict(linears)
    for names in FUSED_SIBLINGS:
        if all(n in left for n in names) and len({left[n].in_features for n in names}) == 1:
            for n in names:
                del left[n]
            yield names
    yield from ((n,) for n in left)


class AdapterBank:
    """LoRA weights of the resident adapters, by slot, and the stack of those in use. Owned by the runner."""

    def __init__(self, groups: Mapping[str, LinearGroup], num_slots: int, rows: RowContext, like: torch.Tensor) -> None:
        self._groups = groups
        self._member_of = {name: (g, i) for g in groups.values() for i, name in enumerate(g.names)}
        self._num_slots = num_slots
        self._rows = rows
        self._like = like  # dtype and device of everything here
        self._loras: dict[int, PreparedLora] = {}
        self._recent: list[int] = []  # slots, most recently used last
        self._stacks: list[Stack] = []  # most recently used last

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
            prepared = PreparedModule(module.a.to(host), (module.b.float() * module.scale).to(host), gain)
            if not all(bool(t.isfinite().all()) for t in prepared.tensors()):
                raise ValueError(f"{name}: weights overflow in {host.dtype}")
            modules[name] = prepared
        return PreparedLora(modules, max((m.a.shape[0] for m in modules.values()), default=0))

    def load(self, slot: int, lora: PreparedLora) -> None:
        """Put an adapter into a free slot: host → device."""
        assert slot not in self._loras
        device = self._like.device
        self._loras[slot] = PreparedLora({name: m.to(device) for name, m in lora.modules.items()}, lora.rank)

    def unload(self, slot: int) -> None:
        """Empty a slot."""
        del self._loras[slot]
        self._recent = [s for s in self._recent if s != slot]
        self._stacks = [stack for stack in self._stacks if slot not in stack.slots]

    def targets(self, slot: int, name: str) -> PreparedModule | None:
        """The adapter's part of a module, if it has one."""
        lora = self._loras.get(slot)
        return lora.modules.get(name) if lora else None

    def use(self, slots: torch.Tensor) -> None:
        """Set the rows' adapters for the next calls. slots: int64 [n], -1 = base."""
        active = [s for s in torch.unique(slots).tolist() if s >= 0 and self._loras[s].rank > 0]
        if not active:
            self._rows.stack = None
            return
        self._recent = [s for s in self._recent if s not in active] + active
        stack = self._find(active) or self._build(self._choose(active))
        self._stacks = [*(s for s in self._stacks if s is not stack), stack][-STACKS_KEPT:]
        self._rows.stack = stack
        self._rows.place = stack.index[slots]
        alone = len(stack.slots) == 1 and bool((slots == stack.slots[0]).all())
        self._rows.hidden = None if alone else ~stack.columns[slots]

    def _ranks(self, slots: Iterable[int]) -> int:
        return sum(self._loras[s].rank for s in slots)

    def _find(self, active: list[int]) -> Stack | None:
        """The smallest built stack that holds these adapters and not many others: masked columns are computed too."""
        fitting = [
            s for s in self._stacks if set(active) <= set(s.slots) and s.rank <= STACK_SLACK * self._ranks(active)
        ]
        return min(fitting, key=lambda stack: stack.rank, default=None)

    def _choose(self, active: list[int]) -> list[int]:
        """The active adapters, and recently used ones that fit the room: they are the likeliest to be asked for next."""
        chosen = list(active)
        total = self._ranks(active)
        room = STACK_ROOM * total
        for slot in reversed(self._recent):
            rank = self._loras[slot].rank
            if slot not in chosen and rank and total + rank <= room:
                chosen.append(slot)
                total += rank
        return sorted(chosen)

    def _build(self, slots: list[int]) -> Stack:
        ranks = [self._loras[s].rank for s in slots]
        device = self._like.device
        columns = torch.zeros(self._num_slots + 1, sum(ranks), dtype=torch.bool, device=device)
        index = torch.full((self._num_slots + 1,), len(slots), device=device)
        start = 0
        for place, (slot, rank) in enumerate(zip(slots, ranks, strict=True)):
            columns[slot, start : start + rank] = True
            index[slot] = place
            start += rank
        stack = Stack(tuple(slots), sum(ranks), columns, index)
        for key, group in self._groups.items():
            part = self._stack_group(group, slots, ranks)
            if part is not None:
                stack.groups[key] = part
        return stack

    def _stack_group(self, group: LinearGroup, slots: list[int], ranks: list[int]) -> _GroupStack | None:
        parts = [[self._loras[s].modules.get(name) for s in slots] for name in group.names]
        if all(p is None for row in parts for p in row):
            return None
        total = sum(ranks)
        shrink = self._like.new_zeros(len(group.names), total, group.in_features)
        expand: list[torch.Tensor | None] = []
        gains: list[torch.Tensor | None] = []
        for m, row in enumerate(parts):
            b = self._like.new_zeros(group.sizes[m], total) if any(row) else None
            gain = None
            if any(p is not None and p.gain is not None for p in row):
                gain = torch.ones(len(slots) + 1, group.sizes[m], device=self._like.device)
            start = 0
            for place, (part, rank) in enumerate(zip(row, ranks, strict=True)):
                if part is not None and b is not None:
                    r = part.a.shape[0]
                    shrink[m, start : start + r] = part.a
                    b[:, start : start + r] = part.b
                    if part.gain is not None and gain is not None:
                        gain[place] = part.gain
                start += rank
            expand.append(b)
            gains.append(gain)
        return _GroupStack(shrink.view(-1, group.in_features), expand, gains)
