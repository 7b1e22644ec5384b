"""Seeds: every random draw comes from an explicit generator whose seed is derived from what it is for.

There is no global generator: the same (run seed, site, round, purpose) gives the same draw, whatever ran before it,
in whichever process. This is what makes a resumed run equal an undisturbed one.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(run_seed: int, *parts: str | int) -> int:
    """Seed in [0, 2**63) for one purpose, e.g. `derive_seed(run.seed, "site-a", 3, "masking")`.

    Guarantees:
        stable: depends on the values alone (BLAKE2b), not on process, platform or Python's hash seed.
        unambiguous: parts are separated and typed, so ("a", "bc") differs from ("ab", "c") and 1 from "1".
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (run_seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(run_seed: int, *parts: str | int) -> "torch.Generator":
    """Torch generator seeded by `derive_seed`."""
    import torch  # takes seconds, and a program that draws with NumPy does not need it

    return torch.Generator().manual_seed(derive_seed(run_seed, *parts))


def numpy_generator(run_seed: int, *parts: str | int) -> np.random.Generator:
    """NumPy generator (PCG64) seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(run_seed, *parts))
