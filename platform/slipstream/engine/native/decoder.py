"""A walked decoder in one call: every layer of a step by one team of threads, without Python in between.

A decode step of a small model is some four hundred calls of a few microseconds each; what the calls themselves take
(arguments, an empty tensor, waking threads) was a third of a step at one request. The arithmetic is the kernels' own, in
the order of `flat.py`, so the result is the same bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from slipstream.engine.attention import KVCache, PagedBatch
from slipstream.engine.flat import Layer, Norm
from slipstream.engine.linear import LinearGroup
from slipstream.engine.native.build import library
from slipstream.engine.native.ops import LANES, LORA_ROWS, MAX_DIM, SILU, NativeRows, Paged, member_table
from slipstream.engine.native.weights import NativeWeight
from slipstream.engine.stacks import RankStack

_INT, _REAL, _PTR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Struct(ctypes.Structure):
    """One of kernels.cpp, field by field."""


class _Projection(_Struct):
    _fields_ = (*((name, _PTR) for name in ("weight", "scale", "bias")), ("inputs", _INT), ("outputs", _INT))


class _Layer(_Struct):
    _fields_ = (
        *((name, _PTR) for name in ("before", "after", "q_norm", "k_norm")),
        *((name, _Projection) for name in ("qkv", "out", "gate_up", "down")),
        ("keys", _PTR), ("values", _PTR), ("window", _INT),
    )  # fmt: skip


class _Decoder(_Struct):
    _fields_ = (
        ("layers", _PTR), ("norm", _PTR),
        *((name, _INT) for name in ("num_layers", "hidden", "heads", "kv_heads", "dim", "width", "blocks", "block_size")),
        ("eps", _REAL), ("scaling", _REAL),
    )  # fmt: skip


class _Lora(_Struct):
    _fields_ = (("shrink", _PTR), ("columns", _INT), ("members", _PTR), ("num_members", _INT))


class _Stack(_Struct):
    _fields_ = (("loras", _PTR), ("rank", _INT), ("tiles", _PTR), ("num_tiles", _INT), ("scratch", _PTR))


class _Step(_Struct):
    _fields_ = (
        *((name, _PTR) for name in (
            "hidden", "out", "cos", "sin", "slots", "sequences", "tasks", "tables", "stacks", "scratch",
        )),
        *((name, _INT) for name in ("rows", "num_tasks", "longest", "num_stacks")),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _StackTable:
    """Where one version of a stack's weights lies. loras: `_Lora` [projections]; members: what they point at."""

    version: int
    loras: ctypes.Array[_Lora]
    columns: int  # most of any projection
    members: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class _CacheTable:
    """The decoder with one KV cache."""

    cache: KVCache
    layers: ctypes.Array[_Layer]
    decoder: _Decoder


class NativeDecoder:
    """Serves steps in bfloat16 on paged attention; adapters with DoRA go the way of `flat.py`."""

    def __init__(self, layers: Sequence[Layer], norm: Norm) -> None:
        self._layers = layers
        self._norm = norm
        first = layers[0]
        self._heads, self._kv_heads = first.qkv.sizes[0] // first.dim, first.qkv.sizes[1] // first.dim
        self._groups = [g for layer in layers for g in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        self._width = first.down.in_features
        self._cache: _CacheTable | None = None
        self._stacks: WeakKeyDictionary[RankStack, _StackTable] = WeakKeyDictionary()

    @staticmethod
    def of(layers: Sequence[Layer], norm: Norm) -> NativeDecoder | None:
        """The decoder in one call; None where the kernels do not serve its shapes, or its weights lie otherwise."""
        groups = [g for layer in layers for g in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        norms = [norm, *(n for layer in layers for n in (layer.before, layer.after, *(layer.norms or ())))]
        shapes = {(tuple(x.qkv.sizes), x.dim, x.down.in_features, x.rules.scaling, x.rules.softcap) for x in layers}
        served = (
            all(isinstance(group.base, NativeWeight) and group.sum_over is None for group in groups)
            and all(type(layer.act).__name__ in SILU for layer in layers)
            and len(shapes) == len({n.eps for n in norms}) == 1
            and layers[0].rules.softcap is None
            and layers[0].dim % LANES == layers[0].qkv.in_features % LANES == layers[0].down.in_features % LANES == 0
            and layers[0].dim <= MAX_DIM
        )
        return NativeDecoder(layers, norm) if served else None

    def __call__(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], paged: PagedBatch
    ) -> torch.Tensor | None:
        """hidden: embeddings [n, H], overwritten; rotary as in `TorchOps.rotate_store` → final hidden states [n, H]; None for
        a step that this does not serve."""
        layout, adapters = paged.layout, self._groups[0].adapters
        served = (isinstance(a, NativeRows) and a.stack.is_plain and a.in_pairs for a in adapters)
        if not isinstance(layout, Paged) or not all(served):
            return None
        rows, heads = hidden.shape[0], self._heads + 2 * self._kv_heads
        decoder = self._with_cache(paged.cache)
        tasks = layout.tasks_of(self._heads // self._kv_heads)
        width = 2 * hidden.shape[1] + (heads + self._heads) * decoder.dim + 3 * self._width
        out, scratch = torch.empty_like(hidden), hidden.new_empty(rows, width)
        stacks, kept = self._lay_out(a for a in adapters if isinstance(a, NativeRows))
        step = _Step(
            hidden.data_ptr(), out.data_ptr(), rotary[0].data_ptr(), rotary[1].data_ptr(), paged.slots.data_ptr(),
            layout.sequences.data_ptr(), tasks.data_ptr(), layout.tables.data_ptr(), ctypes.addressof(stacks),
            scratch.data_ptr(), rows, tasks.shape[0], layout.longest, len(adapters),
        )  # fmt: skip
        found = library()
        assert found is not None
        found.slipstream_decode_bf16(ctypes.byref(decoder), ctypes.byref(step))
        del kept  # until here what `stacks` points at
        return out

    def _lay_out(self, adapters: Iterable[NativeRows]) -> tuple[ctypes.Array[_Stack], list[torch.Tensor]]:
        stacks, kept = [], []
        for rows in adapters:
            table = self._table(rows.stack)
            num_tiles = rows.tiles.shape[0]
            scratch = torch.empty(num_tiles, 4, LORA_ROWS, table.columns)
            loras, tiles = ctypes.addressof(table.loras), rows.tiles.data_ptr()
            stacks.append(_Stack(loras, rows.stack.rank, tiles, num_tiles, scratch.data_ptr()))
            kept.append(scratch)
        return (_Stack * len(stacks))(*stacks), kept

    def _table(self, stack: RankStack) -> _StackTable:
        found = self._stacks.get(stack)
        if found is not None and found.version == stack.version:
            return found
        loras, members, most = [], [], 0
        for group in self._groups:
            part = stack.parts.get(group.key)
            if part is None:
                loras.append(_Lora())
                continue
            own = member_table(group, part.expand)
            members.append(own)
            columns = part.shrink.shape[2]
            most = max(most, columns)
            loras.append(_Lora(part.shrink.data_ptr(), columns, own.data_ptr(), own.shape[0]))
        found = _StackTable(stack.version, (_Lora * len(loras))(*loras), most, members)
        self._stacks[stack] = found
        return found

    def _with_cache(self, cache: KVCache) -> _Decoder:
        if self._cache is None or self._cache.cache is not cache:
            layers = (_Layer * len(self._layers))(*(_layer(x, cache, i) for i, x in enumerate(self._layers)))
            first, (_, blocks, size, _) = self._layers[0], cache.keys[0].shape
            decoder = _Decoder(
                ctypes.addressof(layers), self._norm.weight.data_ptr(), len(layers), first.qkv.in_features, self._heads,
                self._kv_heads, first.dim, self._width, blocks, size, self._norm.eps, first.rules.scaling,
            )  # fmt: skip
            self._cache = _CacheTable(cache, layers, decoder)
        return self._cache.decoder


def _layer(layer: Layer, cache: KVCache, index: int) -> _Layer:
    q, k = (norm.weight.data_ptr() for norm in layer.norms) if layer.norms else (None, None)
    return _Layer(
        layer.before.weight.data_ptr(), layer.after.weight.data_ptr(), q, k, _projection(layer.qkv), _projection(layer.out),
        _projection(layer.gate_up), _projection(layer.down), cache.keys[index].data_ptr(), cache.values[index].data_ptr(),
        layer.rules.window or 0,
    )  # fmt: skip


def _projection(group: LinearGroup) -> _Projection:
    weight = group.base
    assert isinstance(weight, NativeWeight)
    scale, bias = (t.data_ptr() if t is not None else None for t in (weight.scale, weight.bias))
    return _Projection(weight.panels.data_ptr(), scale, bias, group.in_features, weight.outputs)
