"""Noise and samples that nobody can repeat: every bit comes from the operating system.

A generator with a seed would do as well for the statistics, but who knows the seed can subtract the noise exactly.
What was noised is rounded to a grid, a million times finer than the noise and the same whatever was noised: which
floating-point numbers a sum can reach would else tell something of what went into it. A mitigation, not a proof.

Source: Mironov 2012, "On Significance of the Least Significant Bits for Differential Privacy", for the rounding.
"""

import math
import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BITS = 52
"""A float64 holds (k + 1/2) / 2^52 exactly, so that a uniform number is never 0 or 1."""
_GRID_BITS = 20
_CHUNK = 1 << 20


def uniform(size: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 [size]."""
    if not size:
        return torch.empty(0, dtype=torch.float64)
    words = torch.frombuffer(bytearray(os.urandom(8 * size)), dtype=torch.int64)
    return words.bitwise_and_((1 << _BITS) - 1).double().add_(0.5).mul_(2.0**-_BITS)


def normal(size: int) -> Tensor:
    """Standard normal numbers, float64 [size].

    Guarantees:
        standard: mean 0, standard deviation 1.
        secret: no seed, argument or global generator decides them.
    """
    values = torch.empty(size, dtype=torch.float64)
    for part in values.split(_CHUNK):
        part.copy_(torch.special.ndtri(uniform(len(part))))
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
