"""Which part of every tensor a rank holds, after transformers' own tensor-parallel plan.

Column-wise linears keep some of their output rows: attention heads, or columns of the MLP. Row-wise ones keep the matching
inputs, and the ranks' results are added up. Embedding and LM head are cut by the vocabulary. The rest is on every rank.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from slipstream.adapters.weights import AdapterWeights, LoraModule
from slipstream.engine.parallel.group import Alone, Group
from slipstream.errors import ConfigError, ModelUnsupported

UNIT = 16  # cuts fall on multiples of this where the size is one: kernels work on whole vectors
HEADS = "num_attention_heads"


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's part of one linear. None = all of it."""

    rows: tuple[range, ...] | None = None  # of its outputs
    columns: range | None = None  # of its inputs
    full: tuple[int, int] | None = None  # (out, in) of the whole linear

    @property
    def reduces(self) -> bool:
        """Whether the ranks' outputs are to be added up."""
        return self.columns is not None

    def outputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows [out, …] that are this rank's."""
        if self.rows is None:
            return tensor
        return torch.cat([tensor[part.start : part.stop] for part in self.rows])

    def inputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """The columns [n, in] that are this rank's."""
        return tensor if self.columns is None else tensor[:, self.columns.start : self.columns.stop]


WHOLE = Cut()


def spans(total: int, size: int) -> list[range]:
    """`total` in `size` consecutive parts, as even as may be."""
    unit = math.gcd(total, UNIT)
    bounds = [unit * (total // unit * i // size) for i in range(size + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def legal_degrees(heads: int, kv_heads: int) -> list[int]:
    """How many ranks may share a model: each has whole query heads, and whole KV heads or a copy of one."""
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


class Shards:
    """One rank's share of a model."""

    def __init__(self, group: Group, cuts: Mapping[str, Cut], vocab: Sequence[range], config: Any) -> None:
        self.group = group
        self.config = config  # as it is for this rank alone
        self.vocab = tuple(vocab)  # of each rank
        self._cuts = cuts  # by transformers' patterns

    @staticmethod
    def whole(config: Any) -> Shards:
        """All of a model."""
        return Shards(Alone(), {}, [range(int(config.vocab_size))], config)

    @staticmethod
    def of(config: Any, group: Group, name: str) -> Shards:
        """A rank's share. Raises `ConfigError` for a degree that does not divide, `ModelUnsupported` without a plan."""
        if group.size == 1:
            return Shards.whole(config)
        heads = int(getattr(config, HEADS))
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        check_degree(group.size, heads, kv_heads, name)
        plan = getattr(config, "base_model_tp_plan", None)
        if not plan:
            raise ModelUnsupported(f"{name} has no tensor-parallel plan in transformers. Use tensor_parallel_size 1.")
        vocab = spans(int(config.vocab_size), group.size)
        local, places = _local_config(config, group, kv_heads, vocab)
        cuts = {pattern: _cut(pattern, style, places, name) for pattern, style in plan.items()}
        cuts = {pattern: cut for pattern, cut in cuts.items() if cut is not WHOLE}
        return Shards(group, cuts, vocab, local)

    @property
    def vocab_size(self) -> int:
        """Of the whole model."""
        return self.vocab[-1].stop

    @property
    def own_vocab(self) -> range:
        """Token ids whose embeddings and logits are here."""
        return self.vocab[self.group.rank]

    def cut(self, name: str) -> Cut:
        """This rank's part of a linear, by its full name in the model."""
        if self.group.size == 1:
            return WHOLE
        if is_by_vocab(name):
            return Cut(rows=(self.own_vocab,))
        for pattern, cut in self._cuts.items():
            if fnmatch.fnmatchcase(name, f"*{pattern}"):
                return cut
        return WHOLE

    def adapter(self, weights: AdapterWeights) -> AdapterWeights:
        """This rank's part of an adapter: B follows the base's rows and A its columns, so that no collective is added
        (methods.md 5.1). Streams are on every rank; LM heads of their own are cut like the base's."""
        if self.group.size == 1:
            return weights
        streams = weights.streams
        if streams is not None and streams.head is not None:
            own = self.own_vocab
            streams = replace(streams, head=streams.head[:, own.start : own.stop])
        return AdapterWeights({name: _slice(self.cut(name), m) for name, m in weights.lora.items()}, streams)


def is_by_vocab(name: str) -> bool:
    """Whether a module is the embedding or the LM head."""
    return name.rpartition(".")[2] in {"lm_head", "embed_tokens"}


def check_degree(size: int, heads: int, kv_heads: int, name: str) -> None:
    """Raise `ConfigError`, naming the degrees that would do."""
    legal = legal_degrees(heads, kv_heads)
    if size not in legal:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but {name} has {heads} query heads and {kv_heads} KV heads: "
            f"use one of {', '.join(map(str, legal))}."
        )


def _slice(cut: Cut, module: LoraModule) -> LoraModule:
    magnitude = cut.outputs(module.magnitude) if module.magnitude is not None else None
    return replace(module, a=cut.inputs(module.a), b=cut.outputs(module.b), magnitude=magnitude)


@dataclass(frozen=True, slots=True)
class _Places:
    """A rank's rows of each kind of projection."""

    q: range
    kv: range
    mlp: range
    q_size: int  # rows of the whole projection …
    kv_size: int
    mlp_size: int


def _local_config(config: Any, group: Group, kv_heads: int, vocab: Sequence[range]) -> tuple[Any, _Places]:
    """The model's config as if the rank's share were the model, and where that share lies."""
    n, rank, heads = group.size, group.rank, int(getattr(config, HEADS))
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    own_heads = heads // n
    own_kv = max(1, kv_heads // n)
    first_kv = rank * kv_heads // n  # with more ranks than KV heads, several have the same one
    mlp = spans(int(config.intermediate_size), n)[rank]
    local = copy.deepcopy(config)
    local.head_dim = dim
    local.num_attention_heads, local.num_key_value_heads = own_heads, own_kv
    local.intermediate_size = len(mlp)
    local.vocab_size = len(vocab[rank])
    local.pad_token_id = None  # it may lie outside this rank's part
    places = _Places(
        range(rank * own_heads * dim, (rank + 1) * own_heads * dim),
        range(first_kv * dim, (first_kv + own_kv) * dim),
        mlp,
        heads * dim,
        kv_heads * dim,
        int(config.intermediate_size),
    )
    return local, places


def _cut(pattern: str, style: str, places: _Places, name: str) -> Cut:
    """What a line of transformers' plan means for this rank."""
    leaf = pattern.rpartition(".")[2]
    in_mlp = ".mlp." in pattern
    if style.startswith("colwise"):
        rows = _rows(leaf, in_mlp, places)
        if rows is not None:
            return Cut(rows=rows)
    elif style.startswith("rowwise"):
        return Cut(columns=places.mlp if in_mlp else places.q)
    elif style.startswith("replicated"):
        return WHOLE
    raise ModelUnsupported(
        f"{name} asks for {pattern} to be {style}, which is not supported with tensor parallelism. "
        "Use tensor_parallel_size 1."
    )


def _rows(leaf: str, in_mlp: bool, places: _Places) -> tuple[range, ...] | None:
    q, kv, mlp = places.q, places.kv, places.mlp
    if leaf == "q_proj":
        return (q,)
    if leaf in {"k_proj", "v_proj"}:
        return (kv,)
    if leaf == "qkv_proj":  # one tensor: q, k, v
        k, v = places.q_size, places.q_size + places.kv_size
        return q, _shifted(kv, k), _shifted(kv, v)
    if leaf == "gate_up_proj":
        return mlp, _shifted(mlp, places.mlp_size)
    return (mlp,) if in_mlp else None


def _shifted(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)
