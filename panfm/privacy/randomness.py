"""Noise and samples that nobody can repeat: every draw is a cipher's key stream under a key that is used once.

A generator with a known seed would do as well for the statistics, but whoever knows the seed can subtract the noise
exactly. A key is 256 bits that the operating system gives for one draw and nobody keeps. The cipher is ChaCha20, with
which Linux makes the bytes of `os.urandom` too; in the process it takes a tenth of the time.

Floating-point noise leaks by the numbers it can and cannot reach: a sum x + noise that only some x can give tells x.
Two things are done about it. Uniform numbers keep 53 significant bits however small they are, so that the tail is as
dense as the middle, and normal numbers are their exact quantiles: one uniform each. And a noised value is rounded to a
grid, between a 512th and a 256th of the noise's standard deviation and the same for every value, so that each point
of the grid stands for billions of sums, and any x reaches all of them.

Guarantee. Rounding the exact Gaussian mechanism costs no privacy, so it is enough that each grid point comes
up with the right probability. It does up to a relative error of about 1e-11: quantiles are within 3e-15 of the true
ones (tested), the sum is rounded at some 1e-14 of a standard deviation, both seen over a grid of 1/512. If all errors
added up, a thousand steps of a million parameters would cost 0.01 in epsilon, which is the accountant's own margin.

What is not proved: the bound for quantiles where no test looked; that sums of clipped gradients, in float32 and
float64, keep their sensitivity beyond a relative 1e-5; that ChaCha20 cannot be told from random bits; anything about
time, caches, or the quality of the system's source. Adding up several normal numbers, as Holohan & Braghin propose and
Opacus' secure mode does, makes the search for the inputs of one draw expensive; it leaves the gaps in the range, costs
four times the randomness, and was dropped for this.

Source:
    Mironov 2012, "On Significance of the Least Significant Bits for Differential Privacy", for the attack and rounding;
    Holohan & Braghin 2021, "Secure Random Sampling in Differential Privacy", for what was not done.
"""

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from torch import Tensor

_BITS = 52
"""A float64 holds (k + 1/2) / 2^52 exactly, so that a uniform number is never 0 or 1."""
_MAGNITUDE = (1 << 63) - 1
_EXACT = 1 << 53
"""Integers below it are float64s, with room for a fraction."""
_GRID_BITS = 8
_CHUNK = 1 << 18
_KEY, _NONCE = 32, 16
"""Bytes of a key of ChaCha20, and of the counter and nonce, which may be 0 where no key is used twice."""


def uniform(size: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 [size]."""
    return _words(size).bitwise_and_((1 << _BITS) - 1).double().add_(0.5).mul_(2.0**-_BITS)


def normal(size: int) -> Tensor:
    """Standard normal numbers, float64 [size].

    Guarantees:
        standard: mean 0, standard deviation 1.
        dense: as many distinct values per unit of probability in the tail as in the middle.
        secret: no seed, argument or global generator decides them.
    """
    values = torch.empty(size, dtype=torch.float64)
    for part in values.split(_CHUNK):
        words = _words(len(part))
        sign = words.sign()
        part.copy_(torch.special.ndtri(_lower_half(words.bitwise_and_(_MAGNITUDE)))).copysign_(sign)
    return values


def with_noise(value: Tensor, deviation: float) -> Tensor:
    """A float64 tensor plus normal noise of a standard deviation, rounded to the grid."""
    grid = 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS)
    noised = normal(value.numel()).mul_(deviation).view_as(value).add_(value)
    return noised.div_(grid).round_().mul_(grid)


def poisson_sample(indices: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """Each of the indices with probability `rate`, independently of the others."""
    return indices[uniform(len(indices)).numpy() < rate]


def secret_generator() -> torch.Generator:
    """A generator that nobody can repeat, for draws that need not be secret one by one (masks)."""
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)


def _words(size: int) -> Tensor:
    """Random int64 [size]."""
    if not size:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(random_bytes(8 * size), dtype=torch.int64)


def random_bytes(size: int) -> bytearray:
    """Bytes of a ChaCha20 key stream, under a key that the operating system gives for this call alone."""
    drawn = bytearray(size)
    Cipher(ChaCha20(os.urandom(_KEY), nonce=bytes(_NONCE)), mode=None).encryptor().update_into(drawn, drawn)
    return drawn


def _lower_half(integers: Tensor) -> Tensor:
    """Uniform numbers in (0, 1/2] from random integers below 2^63; small ones get the bits that they lack."""
    values = integers.double()
    small = (integers < _EXACT).nonzero().squeeze(1)
    values[small] += uniform(len(small))
    return values.mul_(2.0**-64)
