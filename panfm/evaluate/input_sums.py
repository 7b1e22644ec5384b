"""Means and standard deviations of what a stream's tokenizer reads, from sums that several sites can add up.

They give `input-centre` and `input-scale` of a stream: those that `python -m simulations inputs` prints, or those of a
run whose streams have `input-constants = "summed"`, which asks its sites for the sums before round 1.

    message up    per stream: number of values, sum x, sum x^2     float64 [], [C'], [C']

One image of each training patient is summed, that of the first session. All inputs lie between -7 and 7: intensities
and gradients in [0, 1], and logarithms of them with a floor.

Shape legend: C' inputs of the tokenizer.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from panfm.config import RunConfig, StreamConfig
from panfm.config.model import TOKENIZER_INPUTS
from panfm.data.store import ImageStore
from panfm.errors import ProtocolError
from panfm.evaluate.label_sums import Floats, checked_arrays
from panfm.models.patch_features import patch_step, tokenizer_inputs, typical_constants

Constants = tuple[list[float], list[float]]
"""`input-centre` and `input-scale` of a stream."""
_CHUNK = 64
"""Images at a time."""
_LEAST_DEVIATION = 1e-4
"""Inputs that vary less are scaled as if they varied by this much."""
_LARGEST = 7.0
"""Absolute value of an input, at most."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class InputSums:
    """Sums over the inputs of one stream, at one site or at several together."""

    count: Floats
    """[], blocks or voxels of each input."""
    total: Floats
    """[C']"""
    squares: Floats
    """[C']"""

    @classmethod
    def of(cls, store: ImageStore, name: str, stream: StreamConfig, tokenizer: str, indices: NDArray[np.int64]) -> Self:
        """Sum over the subjects at `indices` that hold the stream."""
        holders, size = store.holders(indices, [name]), stream.channels * TOKENIZER_INPUTS[tokenizer]
        sums = cls(np.array(0.0), np.zeros(size), np.zeros(size))
        for start in range(0, len(holders), _CHUNK):
            images = store.batch(holders[start : start + _CHUNK], [name]).images[name]
            inputs = tokenizer_inputs(images, stream, tokenizer).double().transpose(0, 1).flatten(1)
            sums += cls(np.array(float(inputs.shape[1])), inputs.sum(1).numpy(), inputs.square().sum(1).numpy())
        return sums

    def __add__(self, other: Self) -> Self:
        """Add the sums of other subjects."""
        return type(self)(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def to_arrays(self) -> dict[str, Floats]:
        """Convert to the arrays of a message."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[np.generic]], stream: StreamConfig, tokenizer: str, *, subjects: int
    ) -> Self:
        """Read a site's message.

        Args:
            subjects: Training subjects of the site that hold the stream.
        Raises:
            ProtocolError: an array is missing, of another shape or type or not finite, or no images of so many
                subjects have such sums.
        """
        inputs = stream.channels * TOKENIZER_INPUTS[tokenizer]
        sums = cls(**checked_arrays(arrays, {"count": (), "total": (inputs,), "squares": (inputs,)}))
        expected = subjects * values_per_image(stream, tokenizer)
        if float(sums.count) != expected:
            raise ProtocolError(f"input sums: of {float(sums.count):g} values, expected {expected} of its subjects")
        least = sums.total**2 / expected
        if not ((sums.squares >= least * (1 - _ROUNDING)) & (sums.squares <= expected * _LARGEST**2)).all():
            raise ProtocolError("input sums: found sums and sums of squares that no images have together")
        return sums

    def constants(self) -> Constants:
        """Compute `input-centre` and `input-scale` that bring every input to mean 0 and standard deviation 1, to 4
        digits."""
        mean = self.total / self.count
        deviation = np.sqrt((self.squares / self.count - mean**2).clip(min=0.0)).clip(min=_LEAST_DEVIATION)
        return _rounded(mean), _rounded(1.0 / deviation)


def values_per_image(stream: StreamConfig, tokenizer: str) -> int:
    """Count the values of each input that one image has."""
    return math.prod(stream.grid) * math.prod(patch_step(stream, tokenizer))


def neutral_constants(run: RunConfig, stream: str) -> Constants:
    """Return constants with which a stream's inputs are those that they would be if it had no constants."""
    channels = range(run.streams[stream].channels)
    centre, scale = ([number for number in kind for _ in channels] for kind in typical_constants(run.model.tokenizer))
    return centre, scale


def measured_constants(run: RunConfig, stores: Iterable[ImageStore]) -> dict[str, Constants]:
    """Compute the constants of every stream that training subjects of some stores hold, from sums over all of them."""
    sums: dict[str, InputSums] = {}
    for store in stores:
        for name in (name for name in run.streams if store.num_holding(name, "train")):
            own = InputSums.of(store, name, run.streams[name], run.model.tokenizer, store.indices("train"))
            sums[name] = sums[name] + own if name in sums else own
    return {name: sums[name].constants() for name in run.streams if name in sums}


def with_constants(run: RunConfig, constants: Mapping[str, Constants]) -> RunConfig:
    """Return a run's description with `input-centre` and `input-scale` of some streams."""
    given = {
        name: run.streams[name].model_copy(update={"input_centre": tuple(centre), "input_scale": tuple(scale)})
        for name, (centre, scale) in constants.items()
    }
    return run.model_copy(update={"streams": {**run.streams, **given}})


def _rounded(values: Floats) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
