"""Linears that serve the base and many adapters in one call: shared base GEMMs, and adapters' low-rank parts added by row.

Sibling projections that read the same input (q/k/v, gate/up) run as one base GEMM. Which rows belong to which adapter is
in `RowContext`, which the adapter bank (`lora.py`) writes before the model is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from slipstream.adapters.weights import LoraModule
from slipstream.engine.packed import BaseWeight, PackedWeight
from slipstream.engine.parallel.group import Group
from slipstream.engine.parallel.lora import NOT_SPLIT, LoraSplit
from slipstream.engine.parallel.shards import Shards

MakeWeight = Callable[[str, torch.Tensor, torch.Tensor | None], BaseWeight]
"""(name of a group, weight [out, in], bias) → how its base GEMM runs."""

FUSED_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def as_packed(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseWeight:
    """Every weight at full precision, laid out for the processor."""
    return PackedWeight(weight, bias)


def as_is(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> BaseWeight:
    """Every weight as it lies in the model; such a group can be remade."""
    return PackedWeight(weight, bias, fast=False)


class RowAdapters(Protocol):
    """Adapters of some consecutive rows of a call."""

    def apply_(self, group: LinearGroup, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add their part to the group's base output y [n, sum(sizes)] for input x [n, in], in place, on their rows alone."""
        ...


@dataclass(slots=True)
class RowContext:
    """Which adapters the rows of the current call belong to; written by the bank before the model is called."""

    adapters: tuple[RowAdapters, ...] = ()


class LinearGroup:
    """One or more sibling projections with the same input."""

    def __init__(
        self,
        names: Sequence[str],
        linears: Sequence[nn.Linear],
        rows: RowContext,
        make: MakeWeight = as_packed,
        sum_over: Group | None = None,
        lora: LoraSplit = NOT_SPLIT,
    ) -> None:
        """`sum_over`: the ranks that have the other inputs of these linears, whose outputs are to be added up. `lora`: how
        their adapters are cut, beyond what the linears are."""
        self.names = tuple(names)
        self.sum_over = sum_over
        self.lora = lora
        self.sizes = [linear.out_features for linear in linears]
        self.in_features = linears[0].in_features
        weight = torch.cat([linear.weight.data for linear in linears])
        biases = [linear.bias.data if linear.bias is not None else None for linear in linears]
        bias = None
        if any(b is not None for b in biases):
            zeros = (weight.new_zeros(size) for size in self.sizes)
            bias = torch.cat([b if b is not None else z for b, z in zip(biases, zeros, strict=True)])
        self.base: BaseWeight = make(self.key, weight, bias)
        self._rows = rows
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []
        self._left = 0

    def remake(self, make: MakeWeight) -> None:
        """Keep the base weight in another form; only for groups made `as_is`."""
        assert isinstance(self.base, PackedWeight)
        self.base = make(self.key, self.base.unpacked, self.base.bias)

    @property
    def key(self) -> str:
        """Name of the group: its first member's."""
        return self.names[0]

    @property
    def adapters(self) -> tuple[RowAdapters, ...]:
        """Those of the current call's rows."""
        return self._rows.adapters

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """All members' projections of x [n, in], adapters applied per row → [n, sum(sizes)]."""
        y = self.base(x)
        for adapters in self._rows.adapters:
            adapters.apply_(self, x, y)
        if self.sum_over is not None:
            self.sum_over.all_reduce_(y)
        return y

    def output(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """The member's projection of x [..., in]. All members are computed when the first asks, and kept for the rest."""
        if self._input is not x:
            y = self.whole(x.reshape(-1, self.in_features))
            self._outputs = [part.view(*x.shape[:-1], -1) for part in self.split(y)]
            self._input = x
            self._left = len(self.names)
        out = self._outputs[member]
        self._left -= 1
        if self._left <= 0:
            self._input = None
            self._outputs = []
        return out

    def split(self, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of the members' columns of a [..., sum(sizes)] tensor."""
        return y.split_with_sizes(self.sizes, dim=-1)

    def expanded(self, member: int) -> slice:
        """The member's outputs that adapters add to here; ranks whose results are added up have different ones."""
        return self.lora.outputs(self.sizes[member])

    def member_squares(self, member: int, module: LoraModule) -> torch.Tensor:
        """||W + sBA||² of each output row, float32 [out], over the inputs that are here, from GEMMs with W alone:
        ||W||² + 2s Σ_r B ∘ (W Aᵀ) + s² diag(B A Aᵀ Bᵀ). W itself is packed and cannot be read back."""
        start = sum(self.sizes[:member])
        rows = slice(start, start + self.sizes[member])
        dtype = self.base.bias.dtype if self.base.bias is not None else module.a.dtype
        a, b = module.a.float(), module.b.float() * module.scale
        wa = self.base(module.a.to(dtype), with_bias=False)[:, rows].float().t()  # [out, r]
        return self.base.row_norms_sq[rows] + 2 * (b * wa).sum(1) + (b @ (a @ a.t()) * b).sum(1)


class GroupMember(nn.Module):
    """Stands where an `nn.Linear` stood."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self._member = member
        self.in_features = group.in_features
        self.out_features = group.sizes[member]
        bias = group.base.bias
        self.bias = torch.split(bias, group.sizes)[member] if bias is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] → [..., out], adapters applied per row."""
        return self.group.output(self._member, x)


def swap_linears(
    model: nn.Module,
    rows: RowContext,
    make: MakeWeight = as_packed,
    shards: Shards | None = None,
    fully_sharded_loras: bool = False,
) -> dict[str, LinearGroup]:
    """Replace every `nn.Linear` below `model` by members of groups; returns the groups by their key."""
    groups: dict[str, LinearGroup] = {}
    for parent_name, parent in list(model.named_modules()):
        linears = {n: c for n, c in parent.named_children() if type(c) is nn.Linear}
        for names in _grouping(linears):
            full = [f"{parent_name}.{n}" if parent_name else n for n in names]
            sum_over = shards.group if shards is not None and shards.cut(full[0]).reduces else None
            lora = LoraSplit.of(shards, full[0]) if shards is not None and fully_sharded_loras else NOT_SPLIT
            group = LinearGroup(full, [linears[n] for n in names], rows, make, sum_over, lora)
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
