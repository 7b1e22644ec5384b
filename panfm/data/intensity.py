"""Intensity rules: scale the voxels or pixels of one image to [0, 1]. numpy and Pillow only.

CT and 8-bit pictures have a fixed scale. MR and raw PET do not, so their scale is the scan's own 1st and 99th
percentile; so is that of 16-bit grey pictures, unless their stream gives a window. The rules are those of DEX (arXiv
2605.21861, Methods); its z-score of raw PET is dropped because the min-max that follows undoes it. PET must be raw
counts: SUV are not recognised.

Padding, with which scanners and tools fill what was not scanned (-1, -32768, 65535), counts for no percentile. It is a
negative whole number, or up to three of them, where no other voxel of an MR or PET scan is negative, or else a negative
constant, or the greatest number of an integer type, that is farther from all others than these are from each other.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.anatomy import Modality
from panfm.data.readers import ImageError, Picture

HU_WINDOW = (-200.0, 400.0)
"""CT: Hounsfield units shown as 0 and as 1."""
PERCENTILES = (1.0, 99.0)
"""MR and PET: share of the scan's voxels, in per cent, below 0 and 1."""
GREY_LEVELS = (0.0, 255.0)
"""Everything else: the range of 8-bit grey levels."""
EMPTY_PART = "one value all over the part that the run's shape and spacing show"
_LEAST_RANGE = 0.01
"""An image scaled to [0, 1] whose values span less than this counts as constant."""
_EXPECTED = {Modality.CT: "Hounsfield units", Modality.PHOTO: "grey levels of 0 to 255"}
_LARGEST = 1e37
"""Beyond it, and below its inverse, float32 arithmetic may end in infinity or NaN; float64 is used instead."""
_FINEST = 1e-30
_FILLERS, _FILLER_FROM = (2.0**15 - 1, 2.0**16 - 1, 2.0**31, 2.0**32), 1e30
"""Greatest numbers of integer types, as float32 has them; and numbers that no scanner measures."""
_LEAST_PADDING = 0.005
"""Share of the voxels that have a value, below which it is no padding: it decides no percentile."""
_MOST_PADDINGS = 3
"""Greatest number of different padding values in one image, such as -1024 and -2000 around a CT's circle."""


def apply_intensity(image: NDArray[Any], modality: Modality, *, nan_to_zero: bool = False) -> NDArray[np.float32]:
    """Scale one image to [0, 1] by the rule of its modality.

    Guarantees:
        bounded: every value lies in [0, 1], whatever the range of the finite voxels.
        monotone: a brighter voxel never comes out darker.
        constant: an MR or PET image of one value comes out as zeros.
    Args:
        image: Any shape with at least one voxel; HU for CT, grey levels 0-255 for pictures, raw values for MR and PET.
        modality: Decides the rule.
        nan_to_zero: Whether NaN is background: it comes out as 0, and counts for no percentile.
    Raises:
        ValueError: a voxel is infinite, or NaN where that is not background.
    """
    raw = np.asarray(image, dtype=np.float32)
    known = raw[~np.isnan(raw)] if nan_to_zero else raw
    if not np.isfinite(known).all():
        raise ValueError(f"{(~np.isfinite(known)).sum()} voxels are NaN or infinite")
    scaled = _scaled(raw, known, modality) if known.size else np.zeros_like(raw)
    return np.nan_to_num(scaled, nan=0.0) if nan_to_zero else scaled


def is_constant(scaled: NDArray[Any]) -> bool:
    """Whether all values of an image in [0, 1] are the same, up to a hundredth of the range."""
    return not float(scaled.max()) - float(scaled.min()) >= _LEAST_RANGE


def check_varies(scaled: NDArray[Any], modality: Modality) -> None:
    """Raise ImageError if an image in [0, 1] has the same value everywhere: constant, saturated, or in another unit.

    Args:
        scaled: The whole image, or only its least and greatest value.
    """
    if is_constant(scaled):
        given = f"one value all over ({scaled.min():.3g} to {scaled.max():.3g}, of 0 to 1) once it is scaled"
        raise ImageError(given, _EXPECTED.get(modality, "voxels that differ"))


def picture_levels(image: Picture, channels: int, window: tuple[float, float] | None = None) -> Picture:
    """Convert a picture to grey (`channels` 1) or colour (3) of 8 bits; 16-bit grey to floats in [0, 1].

    Args:
        window: Levels of 16-bit grey shown as 0 and as 1; percentiles of the picture's own pixels when None.
    """
    if not image.mode.startswith("I"):
        return image.convert("L" if channels == 1 else "RGB")
    levels = np.asarray(image, dtype=np.float32)
    low, high = window or _own_range(levels)
    return Image.fromarray(np.clip((levels - low) / max(high - low, 1.0), 0.0, 1.0).astype(np.float32))


def _scaled(raw: NDArray[np.float32], known: NDArray[np.float32], modality: Modality) -> NDArray[np.float32]:
    low, high = _range(known, modality)
    if high <= low:
        return np.zeros(raw.shape, dtype=np.float32)
    largest, span = _largest(known), high - low
    if largest < _LARGEST and span > _FINEST * max(largest, 1.0):
        return np.clip((raw - np.float32(low)) / np.float32(span), 0.0, 1.0)
    return np.clip((raw.astype(np.float64) - low) / span, 0.0, 1.0).astype(np.float32)


def _range(image: NDArray[np.float32], modality: Modality) -> tuple[float, float]:
    if modality is Modality.CT:
        return HU_WINDOW
    if modality not in (Modality.MR, Modality.PET):
        return GREY_LEVELS
    return _own_range(image.astype(np.float64) if _largest(image) >= _LARGEST else image)


def _own_range(image: NDArray[Any]) -> tuple[float, float]:
    """1st and 99th percentile of the voxels that are not padding; least and greatest where these are equal."""
    low, high = map(float, np.percentile(image, PERCENTILES))
    rest = _without_padding(image, low, high)
    if rest.size < image.size:
        return _own_range(rest)
    return (low, high) if high > low else (float(image.min()), float(image.max()))


def _without_padding(image: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """Voxels [N] without a repeated extreme value that decides a percentile and is padding; all where there is none."""
    voxels = image.ravel()
    for extreme, decides in ((voxels.min(), low.__lt__), (voxels.max(), high.__gt__)):
        if extreme == 0 or np.count_nonzero(voxels == extreme) < max(2, _LEAST_PADDING * voxels.size):
            continue
        several = extreme < 0 and _are_paddings(voxels[voxels < 0], voxels.size)
        rest = voxels[voxels >= 0] if several else voxels[voxels != extreme]
        if not rest.size or not (extent := float(rest.max()) - float(rest.min())):
            continue
        nearest = float(rest.min()) if extreme < rest[0] else float(rest.max())
        is_filler = extreme < 0 or extreme in _FILLERS or extreme > _FILLER_FROM
        is_apart = is_filler and abs(float(extreme) - nearest) > extent
        lone_negative = extreme < 0 <= rest.min() and float(extreme).is_integer()
        if decides(nearest) and (lone_negative or is_apart):
            return rest
    return voxels


def _are_paddings(negative: NDArray[Any], size: int) -> bool:
    """Whether the negative voxels of an image of `size` voxels are padding: few whole numbers, each repeated."""
    values, counts = np.unique(negative, return_counts=True)
    enough = counts.min() >= max(2, _LEAST_PADDING * size)
    return bool(len(values) <= _MOST_PADDINGS and enough and (values == np.round(values)).all())


def _largest(image: NDArray[Any]) -> float:
    return float(np.abs(image).max())
