"""Intensity rules: what a voxel value means in each modality, brought to [0, 1].

CT and grey-level pictures have a fixed scale; MR and raw PET do not, so their scale is the scan's own 1st and 99th
percentile. The rules are those of DEX (arXiv 2605.21861, Methods); its z-score of raw PET is dropped because the
min-max that follows undoes it. PET must be raw counts: SUV are not recognised.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import Modality

HU_WINDOW = (-200.0, 400.0)
"""CT: Hounsfield units shown as 0 and as 1."""
PERCENTILES = (1.0, 99.0)
"""MR and PET: share of the scan's voxels, in per cent, below 0 and 1."""
GREY_LEVELS = (0.0, 255.0)
"""Everything else: the range of 8-bit grey levels."""


def apply_intensity(image: NDArray[Any], modality: Modality) -> NDArray[np.float32]:
    """Scale one image to [0, 1] by the rule of its modality.

    Guarantees:
        bounded: every value lies in [0, 1].
        monotone: a brighter voxel never comes out darker.
        constant: an MR or PET image of one value comes out as zeros.
    Args:
        image: Any shape with at least one voxel; HU for CT, grey levels 0-255 for pictures, raw values for MR and PET.
        modality: Decides the rule.
    Raises:
        ValueError: a voxel is NaN or infinite.
    """
    raw = np.asarray(image, dtype=np.float32)
    if not np.isfinite(raw).all():
        raise ValueError(f"{(~np.isfinite(raw)).sum()} voxels are NaN or infinite")
    low, high = _range(raw, modality)
    if high <= low:
        return np.zeros(raw.shape, dtype=np.float32)
    return np.clip((raw - np.float32(low)) / np.float32(high - low), 0.0, 1.0)


def intensity_rule(modality: Modality) -> str:
    """The rule of a modality, in words."""
    if modality is Modality.CT:
        return f"{HU_WINDOW[0]:g} to {HU_WINDOW[1]:g} HU to 0 to 1, clipped"
    if modality not in (Modality.MR, Modality.PET):
        return f"grey levels {GREY_LEVELS[0]:g} to {GREY_LEVELS[1]:g} to 0 to 1"
    return f"the scan's own {PERCENTILES[0]:g}st to {PERCENTILES[1]:g}th percentile to 0 to 1, clipped"


def _range(image: NDArray[np.float32], modality: Modality) -> tuple[float, float]:
    if modality is Modality.CT:
        return HU_WINDOW
    if modality not in (Modality.MR, Modality.PET):
        return GREY_LEVELS
    low, high = np.percentile(image, PERCENTILES)
    if high > low:
        return float(low), float(high)
    return float(image.min()), float(image.max())
