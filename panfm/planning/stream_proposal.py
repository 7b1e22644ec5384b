"""From the sizes of the sites' images to the streams of a run: spacing, shape and patch.

A stream covers the 95th percentile of its volumes' extents, at their median spacing, or coarser where an axis would
have more than 64 voxels (fewer where time is short); a token is 8 voxels wide. The numbers are those of the
configurations that were tried on two cores: tens to a few hundred tokens for each stream.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from panfm.config import StreamConfig
from panfm.planning.image_sizes import ImageSize, StreamSizes

PERCENTILES = (5, 50, 95)
SIDES = (64, 48, 32, 24, 16)
"""Most voxels along an axis, from fine to coarse."""
_PATCH = 8
_SPACING_MM = (1e-3, 1e3)
"""Least and largest spacing that a run description allows (`panfm/config/streams.py`)."""
_SMALL_PICTURE = 64
"""Pictures with a shorter long side are cut into patches of half the size."""


def propose_streams(streams: Mapping[str, StreamSizes], side: int = SIDES[0]) -> dict[str, StreamConfig]:
    """Propose the settings of all streams, with at most `side` voxels along an axis."""
    return {name: propose_stream(stream.sizes, side) for name, stream in streams.items()}


def propose_stream(sizes: Sequence[ImageSize], side: int = SIDES[0]) -> StreamConfig:
    """Propose the settings of one stream from the sizes of its images, all volumes or all pictures."""
    return _volumes(sizes, side) if sizes[0].spacing_mm else _pictures(sizes, side)


def percentiles(sizes: Sequence[ImageSize]) -> NDArray[np.float64]:
    """Percentiles [3, axes] of the voxels along each axis."""
    return np.asarray(np.percentile([size.shape for size in sizes], PERCENTILES, axis=0))


def _volumes(sizes: Sequence[ImageSize], side: int) -> StreamConfig:
    spacings = np.array([size.spacing_mm for size in sizes])
    extents = np.percentile(np.array([size.shape for size in sizes]) * spacings, PERCENTILES[-1], axis=0)
    wanted = np.maximum(np.median(spacings, axis=0), extents.max() / side)
    spacing = [_rounded_up(value) for value in np.clip(wanted, *_SPACING_MM).tolist()]
    voxels = [math.ceil(round(extent / step, 6)) for extent, step in zip(extents.tolist(), spacing, strict=True)]
    patch = [min(_PATCH, number) for number in voxels]
    shape = [-(-number // step) * step for number, step in zip(voxels, patch, strict=True)]
    return StreamConfig(shape=tuple(shape), patch=tuple(patch), spacing_mm=tuple(spacing))


def _pictures(sizes: Sequence[ImageSize], side: int) -> StreamConfig:
    median = np.median([size.shape for size in sizes], axis=0)
    longest = min(float(median.max()), side)
    patch = _PATCH if longest >= _SMALL_PICTURE else _PATCH // 2
    shape = [max(1, round(side * longest / median.max() / patch)) * patch for side in median.tolist()]
    is_colour = np.median([size.channels for size in sizes]) > 1
    return StreamConfig(shape=tuple(shape), patch=(patch, patch), channels=3 if is_colour else 1)


def _rounded_up(value: float) -> float:
    """The next number of two digits: 0.8125 -> 0.82; a number of two digits, give or take float32, stays."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(round(value / unit, 4)) * unit, 10)
