"""The LM head: many rows at the model's dtype, a few candidates at float32."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from slipstream.engine.lora import AdapterBank
from slipstream.engine.packed import packed_linear
from slipstream.engine.parallel.shards import Shards
from slipstream.engine.plan import Pick
from slipstream.engine.streams import OwnHead

Greedy = Callable[[torch.Tensor], list[Pick | None]]
"""hidden [m, H] → of each row the id of the largest logit in float32, the first among equals, and about how far it is
ahead; None = not for this row."""


def all_logits(_head: torch.Tensor) -> Greedy | None:
    """No kernel: the best token is found in all logits."""
    return None


class Candidates(NamedTuple):
    """Ids, int32, that some consecutive rows pick from."""

    ids: array[int]
    rows: range


Scores = Callable[[torch.Tensor, torch.Tensor, Sequence[Candidates]], torch.Tensor]
"""(weight [V, H], states [m, H], whose rows are all some candidates') → float32 [m, most ids]: each row's logits of its own
ids, in their order, -inf after the last."""


def torch_scores(weight: torch.Tensor, states: torch.Tensor, candidates: Sequence[Candidates]) -> torch.Tensor:
    """`Scores` by torch's operations."""
    scores = states.new_full(
        (states.shape[0], max(len(each.ids) for each in candidates)), -torch.inf, dtype=torch.float32
    )
    for ids, rows in candidates:
        picked = weight[torch.frombuffer(ids, dtype=torch.int32)]
        scores[rows.start : rows.stop, : len(ids)] = states[rows.start : rows.stop] @ picked.T
    return scores


class Head:
    """hidden states → logits, with the model's own scaling and soft cap, and adapters on the head if they have any.

    A rank of a tensor-parallel group has some of the vocabulary: V is then the number of its own ids.
    """

    def __init__(
        self,
        member: nn.Module,
        name: str,
        weight: torch.Tensor,
        config: Any,
        bank: AdapterBank,
        shards: Shards | None = None,
        greedy: Callable[[torch.Tensor], Greedy | None] = all_logits,
        scores: Scores = torch_scores,
    ) -> None:
        """`greedy`: of a head's weight, how the best token of rows is found without logits, or None."""
        self._member = member
        self._shards = shards if shards is not None and shards.group.size > 1 else None
        self.name = name
        self._weight = weight
        self._bias = getattr(member, "bias", None)
        self._bank = bank
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

        self._scores = scores
        self._is_plain = self._shards is None and self._bias is None and self._scale > 0
        self._greedy = greedy(weight) if self._is_plain else None

    def is_changed(self, slot: int) -> bool:
        """Whether the slot's adapter is on the head, too."""
        return self._bank.targets(slot, self.name) is not None

    @property
    def scores_some(self) -> bool:
        """Whether there is `scores_among`: not on GPUs, where ids would have to be copied and all logits are cheap."""
        return self._is_plain and self._weight.device.type == "cpu"

    def __call__(self, hidden: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """hidden: [m, H]; slots: adapter slot of each row → logits [m, V] in the model's dtype."""
        self._bank.use(slots)
        return self._shape(self._member(hidden))

    def best(self, hidden: torch.Tensor, slots: Sequence[int]) -> list[Pick | None] | None:
        """The best token of each row of [m, H], the first among equals; None, for a row or all, if that takes all logits.
        Margins are those before a soft cap."""
        # Scaling and soft cap leave the order as it is.
        if self._greedy is None or any(map(self.is_changed, {*slots})):
            return None
        found = self._greedy(hidden)
        if self._scale == 1.0:
            return found
        return [pick and Pick(pick.token, pick.margin * self._scale) for pick in found]

    def scores_among(self, states: torch.Tensor, among: Sequence[array[int]]) -> torch.Tensor:
        """Logits of some ids for each row of [m, H], float32 [m, most ids], -inf after the last. Only where `scores_some`, of
        rows whose adapters are not on the head."""
        assert self.scores_some
        candidates, first = [], 0
        for _, run in groupby(among, key=id):
            own = list(run)
            candidates.append(Candidates(own[0], range(first, first + len(own))))
            first += len(own)
        scores = self._scores(self._weight, states, candidates)
        shaped = self._shape(scores)
        return shaped.masked_fill(scores == -torch.inf, -torch.inf) if self._softcap else shaped

    def drafts(self, states: torch.Tensor, slots: Sequence[int], own: Sequence[OwnHead]) -> torch.Tensor:
        """Logits [m, V] of stream states [m, H]: by the own LM heads where there are some, else by the base's.

        Own heads come without LoRA, but with the base's bias, scaling and soft cap: they began as copies of its weight.
        """
        if not own:
            return self(states, slots)
        logits = states.new_empty(states.shape[0], self._weight.shape[0])
        shared = set(range(states.shape[0]))
        for head in own:
            logits[head.rows] = self._shape(packed_linear(states[head.rows], head.weight, self._bias))
            shared.difference_update(head.rows)
        if shared:
            rows = sorted(shared)
            logits[rows] = self(states[rows], [slots[row] for row in rows])
        return logits

    def exact(self, hidden: torch.Tensor, slot: int, ids: torch.Tensor) -> torch.Tensor:
        """Logits of a few ids of one row, float32 [c]. hidden: [H]; ids: int64 [c], of the whole vocabulary."""
        if self._shards is None:
            return self._exact(hidden, slot, ids)
        own = self._shards.own_vocab
        here = (ids >= own.start) & (ids < own.stop)
        logits = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        logits[here] = self._exact(hidden, slot, ids[here] - own.start)
        self._shards.group.all_reduce_(logits)
        return logits

    def _exact(self, hidden: torch.Tensor, slot: int, ids: torch.Tensor) -> torch.Tensor:
        h = hidden.float()
        logits = self._weight[ids].float() @ h
        lora = self._bank.targets(slot, self.name)
        if lora is not None:
            delta = (h @ lora.a.float()) @ lora.b[:, ids].float()
            logits = (logits + delta) * lora.gain[ids] if lora.gain is not None else logits + delta
        if self._bias is not None:
            logits = logits + self._bias[ids].float()
        return self._shape(logits)

    def _shape(self, logits: torch.Tensor) -> torch.Tensor:
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits
