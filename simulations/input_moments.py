"""Means and standard deviations of what a stream's tokenizer reads, from sums that several sites can add up.

They give the constants `input-centre` and `input-scale` of a run description. The sums of few patients tell about them:
sites that are not simulated should agree on constants from public images, or on such sums under their own rules.

Shape legend: C' inputs of the tokenizer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.config import StreamConfig
from panfm.data.store import ImageStore
from panfm.models.patch_features import tokenizer_inputs

_CHUNK = 64
"""Images at a time."""
_LEAST_DEVIATION = 1e-4
"""Inputs that vary less are scaled as if they varied by this much."""


@dataclass(frozen=True)
class InputMoments:
    """Sums over the inputs of one stream, float64."""

    count: int
    """Blocks or voxels of each input."""
    total: Tensor
    """[C']"""
    squares: Tensor
    """[C']"""

    @classmethod
    def measure(
        cls, store: ImageStore, name: str, stream: StreamConfig, tokenizer: str, indices: NDArray[np.int64]
    ) -> Self:
        """Measure the images of the subjects at `indices` that hold the stream."""
        rows = np.flatnonzero(np.isin(store.rows[name], indices))
        count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for start in range(0, len(rows), _CHUNK):
            images = torch.from_numpy(np.array(store.images[name][rows[start : start + _CHUNK]]))
            inputs = tokenizer_inputs(images, stream, tokenizer).double().transpose(0, 1).flatten(1)
            count, total, squares = count + inputs.shape[1], total + inputs.sum(1), squares + inputs.square().sum(1)
        return cls(count, total, squares)

    @classmethod
    def sum(cls, parts: Iterable["InputMoments"]) -> Self:
        """Add up the sums of several sites, at least one."""
        counts, totals, squares = zip(*((part.count, part.total, part.squares) for part in parts), strict=True)
        return cls(sum(counts), torch.stack(totals).sum(0), torch.stack(squares).sum(0))

    def constants(self) -> tuple[list[float], list[float]]:
        """`input-centre` and `input-scale` that bring every input to mean 0 and standard deviation 1, to 4 digits."""
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean.square()).clamp_min(0.0).sqrt().clamp_min(_LEAST_DEVIATION)
        return _rounded(mean), _rounded(1.0 / deviation)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
