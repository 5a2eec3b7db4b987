"""Sampling against transformers' own logits processors, and the properties speculation rests on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.samplers import IdSampler
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slipstream.engine.native import ops
from slipstream.engine.noise import GumbelNoise
from slipstream.engine.sampling import TOP_P_SHORTLIST, Draw, RowRequest, logprob_of, truncate_
from slipstream.protocol import SamplingParams

CPU = torch.device("cpu")
INF = float("inf")
GREEDY = SamplingParams(temperature=0.0)


WAYS = pytest.mark.parametrize(
    "draw",
    [
        None,
        pytest.param(ops.draw, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")),
    ],
    ids=["torch", "kernel"],
)


def sampler(vocab: int, eos: Sequence[int] = (0,), draw: Draw | None = None) -> IdSampler:
    return IdSampler(vocab, frozenset(eos), CPU, draw=draw)


def random_logits(vocab: int, seed: int, spread: float = 3.0, rows: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (vocab,) if rows is None else (rows, vocab)
    return torch.randn(shape, generator=generator) * spread


def oracle(logits: torch.Tensor, p: SamplingParams, history: Sequence[int] = (0,)) -> torch.Tensor:
    """transformers, in float64."""
    ids, scores = torch.tensor([list(history)]), logits.double().unsqueeze(0)
    steps: list[Any] = []
    if p.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.temperature not in (0.0, 1.0):
        steps.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        steps.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        steps.append(TopPLogitsWarper(p.top_p))
    if p.min_p > 0.0:
        steps.append(MinPLogitsWarper(p.min_p))
    for step in steps:
        scores = step(ids, scores)
    return scores[0]


def warped(logits: torch.Tensor, p: SamplingParams, history: Sequence[int] = (0,), prompt_len: int = 0) -> torch.Tensor:
    """The engine's distribution, as scores."""
    row = RowRequest(p, position=10**6, history=history, prompt_len=prompt_len)
    scores = sampler(logits.shape[-1])._process(logits.float().clone(), row)
    return truncate_(scores.div_(p.temperature), p) if p.temperature else scores


WARPS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.9),
    SamplingParams(top_k=1),
    SamplingParams(top_k=17),
    SamplingParams(top_k=10**6),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.01),
    SamplingParams(top_p=0.999),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=0.6, top_k=40, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=1.5, top_k=200, top_p=0.95, min_p=0.001, repetition_penalty=1.3),
    SamplingParams(temperature=0.8, top_p=0.7, repetition_penalty=0.7),
]


@pytest.mark.parametrize("p", WARPS)
@pytest.mark.parametrize(("vocab", "spread"), [(50, 3.0), (1000, 2.0), (5000, 0.05)])
def test_scores_and_kept_sets_are_those_of_transformers(p: SamplingParams, vocab: int, spread: float) -> None:
    """The flat vocabulary of 5,000 has nuclei far beyond the shortlist."""
    for seed in range(4):
        logits = random_logits(vocab, seed, spread)
        history = list(range(0, vocab, 7))
        ours, theirs = warped(logits, p, history), oracle(logits, p, history)
        kept, wanted = ours > -INF, theirs > -INF
        # float32 and float64 may disagree about one token that lies exactly on a cumulative border
        assert int((kept != wanted).sum()) <= (p.top_p < 1.0)
        both = kept & wanted
        assert bool(both.any())
        torch.testing.assert_close(ours[both].double(), theirs[both], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_a_nucleus_wider_than_the_shortlist_is_complete(top_p: float) -> None:
    vocab = 4 * TOP_P_SHORTLIST
    scores = truncate_(random_logits(vocab, 1, 1e-3), SamplingParams(top_p=top_p))
    kept = int((scores > -INF).sum())
    assert abs(kept - top_p * vocab) < 0.005 * vocab


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    p = SamplingParams(top_k=2)
    assert warped(logits, p).tolist() == [-INF, 3.0, 2.0, 2.0, 2.0, -INF]
    assert oracle(logits, p).tolist() == [-INF, 3.0, 2.0, 2.0, 2.0, -INF]


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_counts_each_token_of_prompt_and_answer_once(penalty: float) -> None:
    logits = random_logits(40, 3)
    history = [1, 1, 1, 5, 7, 7, 39]
    p = SamplingParams(temperature=0.0, repetition_penalty=penalty)
    torch.testing.assert_close(
        warped(logits, p, history, prompt_len=4).double(), oracle(logits, p, history), rtol=1e-6, atol=1e-6
    )


def test_presence_and_frequency_follow_openais_formula_over_the_answer_only() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    logits, prompt, answer = random_logits(20, 4), [1, 1, 2, 3], [2, 5, 5, 5, 7]
    p = SamplingParams(temperature=0.0, presence_penalty=0.6, frequency_penalty=-0.25)
    expected = logits.clone()
    for token in range(20):
        count = answer.count(token)
        expected[token] -= count * -0.25 + (count > 0) * 0.6
    torch.testing.assert_close(warped(logits, p, prompt + answer, prompt_len=4), expected)
    torch.testing.assert_close(warped(logits, p, prompt, prompt_len=4), logits)


def test_logit_bias_is_added_after_the_penalties() -> None:
    logits = torch.tensor([4.0, 3.0, -2.0, 0.0])
    p = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={0: -1.5, 2: 100.0})
    assert warped(logits, p, [0, 2]).tolist() == [0.5, 3.0, 96.0, 0.0]
    assert sampler(4).ids(logits[None], [RowRequest(p, 0, [0, 2])], None) == [2]
    banned = SamplingParams(temperature=0.0, logit_bias={0: -100.0})
    assert sampler(4).ids(logits[None], [RowRequest(banned, 0)], None) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rescore", [False, True])
def test_min_tokens_bans_every_end_until_then(temperature: float, rescore: bool) -> None:
    logits = torch.tensor([[50.0, 49.0, 48.0, 9.0, 0.0]])
    p = SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=(2,))
    chooser = sampler(5, eos=(0, 1))

    def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
        return logits[row, ids]

    for position in range(5):
        (token,) = chooser.ids(logits, [RowRequest(p, position)], exact if rescore else None)
        assert (token in (0, 1, 2)) == (position >= 3)


def test_the_logits_are_left_as_they_are() -> None:
    logits = random_logits(30, 5, rows=3)
    before = logits.clone()
    p = SamplingParams(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0, logit_bias={1: 5.0}, min_tokens=9)
    sampler(30).ids(logits, [RowRequest(p, i, [1, 2]) for i in range(3)], None)
    assert torch.equal(logits, before)


# -- greedy and ties --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("processed", [False, True])
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype, processed: bool) -> None:
    logits = torch.zeros(3, 600, dtype=dtype)
    for row, ids in enumerate([(5, 400), (599, 300, 301), (0, 599)]):
        logits[row, list(ids)] = 2.0
    p = replace(GREEDY, logit_bias={7: -1.0}) if processed else GREEDY
    rows = [RowRequest(p, 0)] * 3

    def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
        return logits[row, ids].float()

    assert sampler(600).ids(logits, rows, None) == [5, 300, 0]
    assert sampler(600).ids(logits, rows, exact) == [5, 300, 0]


def bf16_head(vocab: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at full precision, and as a bf16 head gives them (many ties)."""
    full = random_logits(vocab, seed, 2.0, rows) + 20
    return full, full.to(torch.bfloat16)


PICKS = [
    GREEDY,
    replace(GREEDY, logit_bias={3: 1.0}),
    replace(GREEDY, repetition_penalty=1.1),
    SamplingParams(temperature=1.0, seed=9),
    SamplingParams(temperature=0.3, seed=2**63 + 1),
    SamplingParams(temperature=1.3, seed=4, presence_penalty=0.5),
]


@pytest.mark.parametrize("p", PICKS)
def test_rescoring_decides_ties_of_bf16_as_float32_would(p: SamplingParams) -> None:
    full, coarse = bf16_head(300, 120, 6)
    rows = [RowRequest(p, i, [3, 4, 5], 1) for i in range(120)]
    seen: list[tuple[int, int]] = []

    def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
        seen.append((row, len(ids)))
        return full[row, ids]

    chooser = sampler(300)
    expected = chooser.ids(full, rows, None)
    assert chooser.ids(coarse, rows, exact) == expected
    assert chooser.ids(coarse, rows, None) != expected, "these logits have no ties: the test shows nothing"
    assert {n for _, n in seen} <= set(range(1, 9)), "rescoring is for a few candidates"


@WAYS
def test_rescoring_meets_the_right_row_in_a_mixed_batch(draw: Draw | None) -> None:
    full, coarse = bf16_head(300, 60, 7)
    rows = [RowRequest(PICKS[i % len(PICKS)], i, [3, 4], 1) for i in range(60)]

    def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
        return full[row, ids]

    assert sampler(300, draw=draw).ids(coarse, rows, exact) == sampler(300).ids(full, rows, None)


@WAYS
def test_a_runner_up_with_much_the_larger_logit_is_scored_again(draw: Draw | None) -> None:
    """Its rounding, not the winner's, is what may turn the two round."""
    coarse = torch.zeros(1, 2, dtype=torch.bfloat16)
    noise = GumbelNoise(2, CPU)
    turned = 0
    for position in range(400):
        low, high = noise.row(3, position).tolist()
        wanted = (low - high) * 2.0  # of the second's logit over the first's, for equal sums at temperature 2
        if wanted < 4.0:
            continue
        coarse[0, 1] = wanted
        gap = 0.3 * 2**-8 * wanted  # less than bfloat16 knows of it
        full = torch.tensor([0.0, wanted + (gap if float(coarse[0, 1]) < wanted else -gap)])
        rows = [RowRequest(SamplingParams(temperature=2.0, seed=3), position)]
        best = int((full / 2.0 + noise.row(3, position)).argmax())
        turned += best != int((coarse[0].float() / 2.0 + noise.row(3, position)).argmax())
        assert sampler(2, draw=draw).ids(coarse, rows, lambda _, ids, full=full: full[ids]) == [best]  # type: ignore[misc]
    assert turned > 3


@WAYS
def test_rescoring_cannot_bring_back_what_was_cut(draw: Draw | None) -> None:
    coarse = torch.tensor([[5.0, 4.0, 3.0, 2.0]], dtype=torch.bfloat16)

    def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([5.0, 4.0, 3.0, 1000.0])[ids]

    for position in range(40):
        rows = [RowRequest(SamplingParams(top_k=2, seed=1), position)]
        assert sampler(4, draw=draw).ids(coarse, rows, exact)[0] in (0, 1)


@WAYS
@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-320])
@pytest.mark.parametrize("extra", [{}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3}])
def test_very_cold_sampling_is_greedy(temperature: float, extra: dict[str, Any], draw: Draw | None) -> None:
    logits = random_logits(100, 8, rows=10) + 10
    rows = [RowRequest(SamplingParams(temperature=temperature, seed=5, **extra), i) for i in range(10)]

    def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
        return logits[row, ids]

    best = logits.argmax(-1).tolist()
    assert sampler(100, draw=draw).ids(logits, rows, None) == best
    assert sampler(100, draw=draw).ids(logits, rows, exact) == best


# -- sampling ---------------------------------------------------------------------------------------------------------

CHI2_001 = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}  # 0.1% points by degrees of freedom


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=1.4, top_k=5),
        SamplingParams(min_p=0.2, seed=2**64 - 1),
        SamplingParams(temperature=0.9, repetition_penalty=1.5, frequency_penalty=0.3, logit_bias={4: 1.0}),
    ],
)
@pytest.mark.parametrize("rescore", [False, True])
def test_frequencies_follow_the_warped_distribution(p: SamplingParams, rescore: bool) -> None:
    logits, history = random_logits(8, 12, 1.0), [1, 2, 2, 6]
    plain = replace(p, frequency_penalty=0.0, logit_bias={})
    by_hand = logits.clone()
    if p.repetition_penalty != 1.0:
        by_hand = oracle(by_hand, replace(plain, temperature=1.0), history).float()
    for token in set(history[1:]):
        by_hand[token] -= p.frequency_penalty * history[1:].count(token)
    for token, bias in p.logit_bias.items():
        by_hand[token] += bias
    probs = oracle(by_hand, replace(plain, repetition_penalty=1.0)).softmax(-1)

    def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
        return logits[ids]

    n = 1500
    rows = [RowRequest(p, i, history, 1) for i in range(n)]
    picks = sampler(8).ids(logits.expand(n, -1), rows, exact if rescore else None)
    counts = torch.bincount(torch.tensor(picks), minlength=8).double()
    alive = probs > 0
    assert float(counts[~alive].sum()) == 0
    expected = probs[alive] * n
    chi2 = float(((counts[alive] - expected) ** 2 / expected).sum())
    assert chi2 < CHI2_001[int(alive.sum()) - 1]


MIXED = [
    GREEDY,
    SamplingParams(seed=3),
    SamplingParams(temperature=0.8, top_p=0.9, seed=4, repetition_penalty=1.4),
    SamplingParams(temperature=1.2, top_k=9, seed=5, presence_penalty=1.5, frequency_penalty=1.0, min_tokens=4),
    replace(GREEDY, frequency_penalty=2.0, logit_bias={6: 2.0}, min_tokens=2),
]


@pytest.mark.parametrize("p", MIXED)
def test_rows_with_drafts_in_their_history_are_the_single_picks_of_plain_decoding(p: SamplingParams) -> None:
    """Row j of a verification sees prompt + answer + drafts 1 … j, and must decide what step j alone would have."""
    vocab, k = 12, 5
    logits = random_logits(vocab, 13, 1.0, k + 1)
    prompt, answer = [1, 2, 3], [4, 4]
    history, one_by_one = prompt + answer, []
    for j in range(k + 1):
        (token,) = sampler(vocab).ids(logits[j : j + 1], [RowRequest(p, 2 + j, list(history), 3)], None)
        one_by_one.append(token)
        history.append(token)
    drafts = one_by_one[:k]
    rows = [RowRequest(p, 2 + j, prompt + answer + drafts[:j], 3) for j in range(k + 1)]
    assert sampler(vocab).ids(logits, rows, None) == one_by_one


def test_a_batch_of_everybody_is_everybody_alone() -> None:
    logits = random_logits(64, 14, 2.0, 40)
    rows = [RowRequest(MIXED[i % 5], i // 5, [i % 64, 3, 3], 1) for i in range(40)]
    together = sampler(64).ids(logits, rows, None)
    assert together == [sampler(64).ids(logits[i : i + 1], [row], None)[0] for i, row in enumerate(rows)]
    order = list(reversed(range(40)))
    shuffled = sampler(64).ids(logits[order], [rows[i] for i in order], None)
    assert shuffled == [together[i] for i in order]


def test_drafting_with_the_same_noise_agrees_where_the_distributions_agree() -> None:
    logits = random_logits(200, 15, 1.0, 200)
    near = logits + 0.02 * random_logits(200, 16, 1.0, 200)
    rows = [RowRequest(SamplingParams(temperature=1.5, seed=8), i) for i in range(200)]
    a, b = sampler(200).ids(logits, rows, None), sampler(200).ids(near, rows, None)
    assert sum(x == y for x, y in zip(a, b, strict=True)) > 180


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_own(dtype: torch.dtype) -> None:
    logits = random_logits(50, 17).to(dtype)
    logs = logits.double().log_softmax(-1)
    token = int(logits.argmin())
    plain = logprob_of(logits, token, 0)
    assert plain.top == ()
    assert plain.logprob == pytest.approx(float(logs[token]), abs=1e-5)
    five = logprob_of(logits, token, 5)
    assert five.logprob == plain.logprob
    values = logs.topk(5).values.tolist()
    assert [lp for _, lp in five.top] == pytest.approx(values, abs=1e-5)
    assert [float(logs[i]) for i, _ in five.top] == pytest.approx(values, abs=1e-9)
    assert len({i for i, _ in five.top}) == 5


@WAYS
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("bias", [{}, {3: 2.0}])
def test_margins_are_how_far_the_best_score_is_ahead(
    temperature: float, bias: dict[int, float], draw: Draw | None
) -> None:
    """Of scaled logits with their noise, where there is some; however the row is picked."""
    logits = random_logits(200, 7, rows=6)
    params = SamplingParams(temperature=temperature, seed=5, logit_bias=bias)
    rows = [RowRequest(params, i) for i in range(6)]
    scores = logits.clone()
    for token, more in bias.items():
        scores[:, token] += more
    if temperature:
        noise = GumbelNoise(200, CPU)
        scores = scores / temperature + torch.stack([noise.row(5, i) for i in range(6)])
    first, second = scores.topk(2).values.unbind(1)
    for exact in (None, lambda row, ids: logits[row, ids]):
        picked = sampler(200, draw=draw).pick(logits, rows, exact)
        assert [pick.token for pick in picked] == scores.argmax(1).tolist()
        torch.testing.assert_close(torch.tensor([pick.margin for pick in picked]), first - second, rtol=1e-3, atol=1e-3)
