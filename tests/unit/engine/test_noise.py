"""Keyed noise: pure, Gumbel, and independent along every part of its key. All seeds are fixed: nothing here is random."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from slipstream.engine.noise import GumbelNoise, _fmix32, _gumbel, choice_seed, mix64, noise_key

CPU = torch.device("cpu")
EULER = 0.5772156649015329


def noise(vocab: int) -> GumbelNoise:
    return GumbelNoise(vocab, CPU)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_mix64_is_splitmix64() -> None:
    """The first outputs of the reference generator seeded with 0 and with 1234567."""
    golden = 0x9E3779B97F4A7C15
    assert [mix64(i * golden % 2**64) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert mix64(1234567) == 6457827717110365317


def fmix32(h: int) -> int:
    """MurmurHash3's finaliser as published, on an unsigned integer."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_the_mixer_is_murmurhash3s() -> None:
    generator = torch.Generator().manual_seed(1)
    signed = torch.randint(-(2**31), 2**31, (500,), generator=generator).to(torch.int32)
    expected = [fmix32(v % 2**32) for v in signed.tolist()]
    assert [v % 2**32 for v in _fmix32(signed.clone()).tolist()] == expected


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 63])
def test_every_bit_of_the_key_reaches_the_noise(bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = noise_key(7, 3)
    before = noise(2000).row(7, 3)
    monkeypatch.setattr("slipstream.engine.noise.noise_key", lambda seed, position: key ^ 1 << bit)
    after = noise(2000).row(7, 3)
    assert (before == after).float().mean() < 0.01
    assert abs(correlation(before, after)) < 0.1


def test_the_same_key_gives_the_same_bits() -> None:
    one, two = noise(1000), noise(1000)
    first = one.row(7, 3)
    one.row(8, 3)
    assert torch.equal(first, one.row(7, 3))
    assert torch.equal(first, two.row(7, 3))
    assert first.dtype == torch.float32


def test_the_noise_of_an_id_does_not_depend_on_the_vocabulary() -> None:
    assert torch.equal(noise(1000).row(7, 3)[:100], noise(100).row(7, 3))


@pytest.mark.parametrize(
    ("seed", "position"), [(8, 3), (7, 4), (3, 7), (7 + 2**32, 3), (7 + 2**63, 3), (2**64 - 1, 3), (7, 3 + 2**32)]
)
def test_every_part_of_the_key_matters(seed: int, position: int) -> None:
    source = noise(2000)
    a, b = source.row(7, 3), source.row(seed, position)
    assert not torch.equal(a, b)
    assert (a == b).float().mean() < 0.01
    assert abs(correlation(a, b)) < 0.1
    assert len(set(a.tolist())) > 1990


def test_keys_of_many_positions_and_seeds_are_distinct() -> None:
    keys = {noise_key(s, p) for s in [0, 1, 2, 2**32, 2**63, 2**64 - 1] for p in range(2000)}
    assert len(keys) == 12_000
    assert all(0 <= k < 2**64 for k in keys)


def test_mean_variance_and_distribution_are_gumbels() -> None:
    source = noise(50_000)
    x = torch.cat([source.row(seed, p) for seed in (0, 5, 2**64 - 1) for p in range(4)]).double()
    n = x.numel()
    assert abs(float(x.mean()) - EULER) < 4 * math.pi / math.sqrt(6 * n)
    assert abs(float(x.var()) - math.pi**2 / 6) < 0.02
    cdf = torch.exp(-torch.exp(-x.sort().values))
    ks = float((cdf - torch.arange(n) / n).abs().max())
    assert ks < 1.63 / math.sqrt(n)  # the 1% point of Kolmogorov and Smirnov


def test_every_bit_pattern_becomes_its_exact_gumbel_value() -> None:
    """Above all in the upper tail: a coarse u there hands out one huge noise far too often."""
    generator = torch.Generator().manual_seed(0)
    small = torch.arange(0, 3000)
    shifted = (1 << torch.arange(2, 32)) - 1
    anywhere = torch.randint(0, 2**32, (5000,), generator=generator)
    unsigned = torch.cat([small, shifted, anywhere]).double()
    signed = torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)
    uniform = ((unsigned + 0.5) / 2**32).clamp(max=1 - 2**-24)
    exact = -torch.log(-torch.log1p(-uniform))
    assert float((_gumbel(signed).double() - exact).abs().max()) < 2e-5
    extremes = _gumbel(torch.tensor([-(2**31), -1, 0, 2**31 - 1], dtype=torch.int32))
    assert bool(torch.isfinite(extremes).all())


CHI2_001 = {5: 20.5, 8: 26.1}  # 0.1% points by degrees of freedom


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


P6 = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.07, 0.03], dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_argmax_follows_p_over_positions(seed: int) -> None:
    source, logp = noise(6), P6.log().float()
    picks = torch.tensor([int((logp + source.row(seed, p)).argmax()) for p in range(3000)])
    assert chi_square(torch.bincount(picks, minlength=6).double(), P6) < CHI2_001[5]


@pytest.mark.parametrize("position", [0, 17])
@pytest.mark.parametrize("step", [1, 2**32, 2**57])
def test_argmax_follows_p_over_seeds(position: int, step: int) -> None:
    source, logp = noise(6), P6.log().float()
    seeds = [i * step % 2**64 for i in range(3000 if step < 2**57 else 128)]
    picks = torch.tensor([int((logp + source.row(s, position)).argmax()) for s in seeds])
    assert chi_square(torch.bincount(picks, minlength=6).double(), P6) < CHI2_001[5]


def test_neighbouring_positions_seeds_and_ids_are_uncorrelated() -> None:
    source = noise(5000)
    by_position = torch.stack([source.row(3, p) for p in range(20)])
    by_seed = torch.stack([source.row(s, 3) for s in range(20)])
    limit = 4 / math.sqrt(19 * 5000)
    assert abs(correlation(by_position[1:], by_position[:-1])) < limit
    assert abs(correlation(by_seed[1:], by_seed[:-1])) < limit
    assert abs(correlation(by_position[:, 1:], by_position[:, :-1])) < limit
    for lag in (2, 64, 256, 1024):
        assert abs(correlation(by_position[:, lag:], by_position[:, :-lag])) < limit


def test_pairs_of_picks_are_independent() -> None:
    source, third = noise(3), torch.zeros(3)
    picks = [int((third + source.row(11, p)).argmax()) for p in range(3000)]
    pairs = torch.bincount(torch.tensor([3 * a + b for a, b in pairwise(picks)]), minlength=9)
    assert chi_square(pairs.double(), torch.full((9,), 1 / 9, dtype=torch.float64)) < CHI2_001[8]


def test_choices_have_seeds_of_their_own() -> None:
    assert choice_seed(42, 0) == 42
    seeds = {choice_seed(s, c) for s in (0, 1, 42, 2**64 - 1) for c in range(64)}
    assert len(seeds) == 4 * 64
    assert all(0 <= s < 2**64 for s in seeds)
    assert choice_seed(42, 3) == choice_seed(42, 3)
    source = noise(2000)
    a, b = source.row(choice_seed(42, 1), 0), source.row(choice_seed(42, 2), 0)
    assert abs(correlation(a, b)) < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_any_64_bit_seed_and_any_position_is_finite(seed: int) -> None:
    source = noise(300)
    for position in (0, 1, 2**31, 2**40):
        assert bool(torch.isfinite(source.row(seed, position)).all())
