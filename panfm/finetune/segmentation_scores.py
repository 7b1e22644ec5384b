"""Agreement of a predicted mask with the true one, class by class: Dice, and the 95 % Hausdorff distance in mm.

    Dice   2 |A and B| / (|A| + |B|)
    HD95   the greater of the 95th percentiles of the distances from each surface to the other

The formulas, and the numbers, are those of MONAI's `compute_dice` and `compute_hausdorff_distance(percentile=95)`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


def dice(predicted: Mask, true: Mask) -> float:
    """Dice of two masks of one shape; NaN if both are empty."""
    total = int(predicted.sum()) + int(true.sum())
    return 2.0 * int((predicted & true).sum()) / total if total else float("nan")


def hausdorff_95(predicted: Mask, true: Mask, spacing: Sequence[float]) -> float:
    """95 % Hausdorff distance of two masks of one shape; NaN if either is empty.

    Args:
        spacing: Size of a voxel along each axis.
    """
    if not (predicted.any() and true.any()):
        return float("nan")
    [box] = ndimage.find_objects((predicted | true).astype(np.uint8))
    there, back = _surface(predicted[box]), _surface(true[box])
    return max(_percentile(there, back, spacing), _percentile(back, there, spacing))


def _surface(mask: Mask) -> Mask:
    """Voxels of a mask that have a neighbour outside the mask, or lie at the edge of the image."""
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


def _percentile(start: Mask, goal: Mask, spacing: Sequence[float]) -> float:
    distances = ndimage.distance_transform_edt(~goal, sampling=spacing)
    return float(np.percentile(distances[start], 95))
