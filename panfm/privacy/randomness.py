"""Noise and samples that nobody can repeat: every bit comes from the operating system.

A generator with a seed would do as well for the statistics, but who knows the seed can subtract the noise exactly.
Each normal number is the sum of four over two, so that the rounding of one cannot be read off the result.

Source: Holohan & Braghin 2021, "Secure Random Sampling in Differential Privacy".
"""

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BITS = 52
"""A float64 holds (k + 1/2) / 2^52 exactly, so that a uniform number is never 0 or 1."""
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
        part.copy_(torch.special.ndtri(uniform(4 * len(part))).view(4, -1).sum(dim=0).mul_(0.5))
    return values


def poisson_sample(indices: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """Each of the indices with probability `rate`, independently of the others."""
    return indices[uniform(len(indices)).numpy() < rate]


def secret_generator() -> torch.Generator:
    """A generator that nobody can repeat, for draws that need not be secret one by one (masks)."""
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)
