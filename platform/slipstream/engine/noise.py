"""Sampling noise that depends on nothing but (request seed, output position, vocabulary id).

With y = argmax(log p + Gumbel noise) the chosen token is a pure function of the distribution and of that key, so
speculation, batching, chunking, preemption and the replica can never change the text (methods.md 2.3). The generator is a
counter-based one: SplitMix64 (Steele, Lea and Flood 2014) makes a key from (seed, position), and the 32-bit finaliser of
MurmurHash3 spreads (key, id) over the vocabulary.
"""

from __future__ import annotations

import torch

_MASK64 = (1 << 64) - 1


def mix64(value: int) -> int:
    """SplitMix64's finaliser on an unsigned 64-bit integer."""
    z = (value + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def noise_key(seed: int, position: int) -> int:
    """The key of one output position of one request, unsigned 64-bit."""
    return mix64(mix64(seed & _MASK64) ^ position)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice `choice` of a request with n > 1; choice 0 keeps the request's own."""
    return seed if choice == 0 else mix64(seed ^ mix64(choice))


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _fmix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser, in place, on int32 bit patterns (shifts must be logical, torch's are not)."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed32(0x85EBCA6B)
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed32(0xC2B2AE35)
    x ^= (x >> 16) & 0xFFFF
    return x


def _gumbel(bits: torch.Tensor) -> torch.Tensor:
    """int32 bit patterns → standard Gumbel, float32: -log(-log1p(-u)) with u = (bits + 1/2) / 2^32, bits read as unsigned.

    The noise is large, and decides, where u is small, so u must be precise there: the signed value is converted before
    2^32 is added to the upper half. (Shifting the range first would round all u below 2^-26 to one value.)
    """
    uniform = bits.to(torch.float32).add_(0.5)
    uniform += (uniform < 0).to(torch.float32).mul_(2.0**32)
    uniform = uniform.mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


class GumbelNoise:
    """Standard Gumbel noise over a vocabulary of `vocab_size` ids."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._ids = torch.arange(vocab_size, dtype=torch.int32, device=device)

    def row(self, seed: int, position: int) -> torch.Tensor:
        """The noise of one output position: float32 [vocab_size]. Always this shape, so always the same bits."""
        key = noise_key(seed, position)
        low, high = _signed32(key & 0xFFFFFFFF), _signed32(key >> 32)
        bits = _fmix32(_fmix32(self._ids ^ low) + high)
        return _gumbel(bits)
