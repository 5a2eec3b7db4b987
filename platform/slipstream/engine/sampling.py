"""From logits to one token a row: penalties, temperature, truncation and keyed noise, in the order of methods.md 2.5.

`pick` is a pure function of (logits row, history, parameters, output position). Verification calls it for every row with
the history that row would have had without speculation; drafting calls it on the streams' logits for the positions ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from slipstream.engine.noise import GumbelNoise
from slipstream.engine.plan import Logprob, Pick
from slipstream.protocol import SamplingParams

TOP_CANDIDATES = 8  # rows of the head that are scored again in float32
MIN_TEMPERATURE = 1e-5  # colder than this divides logits into infinities; it is greedy decoding in all but name
TOP_P_SHORTLIST = 1024  # sorting a whole vocabulary costs milliseconds; most nuclei are far smaller

ExactLogits = Callable[[int, torch.Tensor], torch.Tensor]
"""(row, ids [c]) → float32 [c]: logits of a few ids at full precision. A bf16 head makes ties at several percent of
positions (methods.md 2.7), so the best few are compared in float32."""


@dataclass(frozen=True, slots=True)
class Best:
    """Of each row of logits: ids int64 [R] of the largest (the first among equals), its values [R], gaps [R] to the next."""

    ids: torch.Tensor
    values: torch.Tensor
    gaps: torch.Tensor


@dataclass(frozen=True, slots=True)
class Drawn:
    """Of each row, best first, ids int64 [R, c] of the largest sums of scaled logit and noise that truncation leaves, -1
    where there are fewer; their noise and those sums, float32 [R, c]."""

    ids: torch.Tensor
    noise: torch.Tensor
    sums: torch.Tensor


Draw = Callable[[torch.Tensor, Sequence["RowRequest"], int], Drawn]
"""(logits [R, V], how each row is sampled, c) → the best c of each, for rows whose logits nothing changes first."""


def torch_best(logits: torch.Tensor) -> Best:
    """The best of each row of logits [R, V]."""
    values = logits.topk(min(2, logits.shape[-1]), dim=-1).values
    return Best(logits.argmax(dim=-1), values[:, 0], values[:, 0] - values[:, -1])


class Columns:
    """Where the columns of logits are: all here. `own` is what this process has of some rows [R, V]."""

    def __init__(self, best: Callable[[torch.Tensor], Best] = torch_best) -> None:
        self._best = best

    def best(self, own: torch.Tensor) -> Best:
        """The best of each row."""
        return self._best(own)

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """The rows with all their columns [R, V]."""
        return own


@dataclass(frozen=True, slots=True)
class RowRequest:
    """How one logits row is turned into a token."""

    params: SamplingParams
    position: int  # index in the answer; keys the noise
    history: Sequence[int] = ()  # prompt + answer + drafts before this row; only read when a penalty is on
    prompt_len: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether nothing changes the row's logits before the temperature."""
        return not self.params.changes_logits and self.position >= self.params.min_tokens

    @property
    def is_greedy(self) -> bool:
        """Whether its best logit's id is all that is wanted."""
        return self.params.temperature == 0.0 and self.params.logprobs is None and self.is_plain

    @property
    def temperature(self) -> float:
        """What logits are divided by, of a row that is sampled."""
        return max(self.params.temperature, MIN_TEMPERATURE)


class Sampler:
    """Picks tokens. Stateless apart from the vocabulary's ids."""

    def __init__(
        self,
        vocab_size: int,
        eos_ids: frozenset[int],
        device: torch.device,
        columns: Columns | None = None,
        draw: Draw | None = None,
    ) -> None:
        """`draw`: a kernel for rows that are sampled; None = torch's operations, row by row."""
        self.columns = columns or Columns()
        self._draw = draw
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self._noise = GumbelNoise(vocab_size, device)

    def pick(self, logits: torch.Tensor, rows: Sequence[RowRequest], exact: ExactLogits | None) -> list[Pick]:
        """One token a row. logits: [R, V] (of a tensor-parallel rank: its columns), any float dtype, left as it is.

        Margins are those of the logits given, whatever `exact` says of close calls.
        """
        plain = [i for i, row in enumerate(rows) if row.is_plain]
        greedy = [i for i in plain if rows[i].params.temperature == 0.0]
        drawn = [i for i in plain if rows[i].params.temperature > 0.0] if self._draw is not None else []
        picks: dict[int, Pick] = {}
        for mine, pick in ((greedy, self._greedy), (drawn, partial(self._drawn, requests=rows))):
            if mine:
                picks.update(zip(mine, pick(logits, mine, exact), strict=True))
        others = [i for i in range(len(rows)) if i not in picks]
        if others:
            whole = self.columns.whole(_rows(logits, others))
            for i, row_logits in zip(others, whole, strict=True):
                picks[i] = self._pick_row(row_logits, rows[i], partial(exact, i) if exact else None)
        return [picks[i] for i in range(len(rows))]

    def _greedy(self, logits: torch.Tensor, rows: list[int], exact: ExactLogits | None) -> list[Pick]:
        picked = _rows(logits, rows)
        found = self.columns.best(picked)
        best: list[int] = found.ids.tolist()
        margins: list[float] = found.gaps.tolist()
        if exact is None:
            return list(map(Pick, best, margins))
        close = close_calls(found.gaps, found.values.abs())
        whole = self.columns.whole(_rows(picked, close)) if close else ()
        for j, row in zip(close, whole, strict=True):
            ordered = row.topk(min(TOP_CANDIDATES, row.shape[-1])).indices.sort().values
            best[j] = int(ordered[exact(rows[j], ordered).argmax()])  # equal scores go to the lowest id, as argmax does
        return list(map(Pick, best, margins))

    def _drawn(
        self, logits: torch.Tensor, rows: list[int], exact: ExactLogits | None, requests: Sequence[RowRequest]
    ) -> list[Pick]:
        assert self._draw is not None
        picked = self.columns.whole(_rows(logits, rows))
        asked = [requests[i] for i in rows]
        found = self._draw(picked, asked, TOP_CANDIDATES if exact is not None else 2)
        best: list[int] = found.ids[:, 0].clamp_min(0).tolist()  # everything banned, or not a number: as good as any
        ahead = found.sums[:, 0] - found.sums[:, 1]
        margins: list[float] = ahead.tolist()
        if exact is None:
            return list(map(Pick, best, margins))
        heat = torch.tensor([row.temperature for row in asked], device=logits.device)
        gaps = ahead * heat
        logits_of = ((found.sums - found.noise) * heat.unsqueeze(1)).abs().masked_fill_(found.ids < 0, 0.0)
        for j in close_calls(
            gaps, logits_of.amax(dim=1)
        ):  # with noise, who comes second may have much the larger logit
            own = found.ids[j]
            order = own[own >= 0].argsort(stable=True)  # ascending ids: equal scores go to the lowest
            ids = own[own >= 0][order]
            final = exact(rows[j], ids) / asked[j].temperature + found.noise[j, : len(ids)][order]
            best[j] = int(ids[final.argmax()])
        return list(map(Pick, best, margins))

    def _pick_row(
        self, logits: torch.Tensor, row: RowRequest, exact: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> Pick:
        p = row.params
        noise = self._noise.row(p.seed, row.position) if p.temperature > 0.0 else None
        temperature = row.temperature
        raw = logits.float()
        scores = self._process(raw.clone(), row)
        if noise is not None:
            scores = truncate_(scores.div_(temperature), p)
        noisy = scores + noise if noise is not None else scores
        values, ids = noisy.topk(min(TOP_CANDIDATES, noisy.shape[-1]))
        margin = float(values[0] - values[min(1, len(values) - 1)])
        ids = ids[values > float("-inf")].sort().values
        if exact is None or not len(ids):  # everything banned, or not a number: `noisy` has no better answer either
            return Pick(int(noisy.argmax()), margin)
        patched = raw.clone()
        patched[ids] = exact(ids)
        final = self._process(patched, row)[ids]
        if noise is not None:
            final = final / temperature + noise[ids]
        return Pick(int(ids[final.argmax()]), margin)

    def _process(self, logits: torch.Tensor, row: RowRequest) -> torch.Tensor:
        """Mask → penalties → bias, in place on float32 [V]."""
        p = row.params
        if p.has_penalties:
            _penalise_(logits, row)
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(p.logit_bias.values()), dtype=torch.float32, device=logits.device)
        if row.position < p.min_tokens:
            banned = sorted({*self.eos_ids, *p.stop_token_ids})
            logits[torch.tensor(banned, dtype=torch.int64, device=logits.device)] = float("-inf")
        return logits


def close_calls(gaps: torch.Tensor, values: torch.Tensor) -> list[int]:
    """Rows whose runner-up is within the rounding of the head's dtype: only they can change their mind. Of each row: how far
    the second is from the best, in logits, and how large a candidate's logit is, float32 [R]."""
    found: list[int] = (gaps <= 0.02 * values.clamp_min(1.0)).nonzero().flatten().tolist()
    return found


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, in ascending order; all of them are not copied."""
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _penalise_(logits: torch.Tensor, row: RowRequest) -> None:
    """Repetition penalty over prompt and answer (CTRL, arXiv 1909.05858: once per distinct token); presence and frequency
    penalties over the answer, as OpenAI defines them. In place on float32 [V]."""
    p = row.params
    if p.repetition_penalty != 1.0:
        seen = torch.unique(torch.tensor(list(row.history), device=logits.device))
        z = logits[seen]
        logits[seen] = torch.where(z > 0, z / p.repetition_penalty, z * p.repetition_penalty)
    answer = list(row.history[row.prompt_len :])
    if answer and (p.presence_penalty or p.frequency_penalty):
        ids, counts = torch.unique(torch.tensor(answer, device=logits.device), return_counts=True)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * counts.float()


def truncate_(scores: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """Top-k → top-p → min-p, in place on float32 [V] of temperature-scaled logits; what is cut becomes -inf."""
    if 0 < p.top_k < scores.shape[-1]:
        kth = scores.topk(p.top_k).values[-1]
        scores[scores < kth] = float("-inf")
    if p.top_p < 1.0:
        _top_p_(scores, p.top_p)
    if p.min_p > 0.0:
        # p_i >= min_p * p_max, without normalising
        scores[scores < scores.max() + torch.tensor(p.min_p).log().item()] = float("-inf")
    return scores


def _top_p_(scores: torch.Tensor, top_p: float) -> None:
    """Keep the smallest set of tokens whose probability reaches `top_p` (arXiv 1904.09751)."""
    logsum = scores.logsumexp(dim=-1)
    size = min(TOP_P_SHORTLIST, scores.shape[-1])
    while True:
        values = scores.topk(size).values
        probs = (values - logsum).exp()
        before = probs.cumsum(-1) - probs  # mass of strictly better tokens
        if size == scores.shape[-1] or float(before[-1]) >= top_p:
            break
        size = scores.shape[-1]
    keep = before < top_p
    keep[0] = True
    scores[scores < values[keep][-1]] = float("-inf")  # equals of the last one stay: their order says nothing


def logprob_of(logits: torch.Tensor, token: int, alternatives: int) -> Logprob:
    """The model's own log-probability of `token` and of the best alternatives; logits: [V], unprocessed."""
    logs = logits.float().log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        values, ids = logs.topk(alternatives)
        top = tuple(zip((int(i) for i in ids), (float(v) for v in values), strict=True))
    return Logprob(float(logs[token]), top)
