"""Weights with which an axis of an image is blurred and read at other places.

The formula, and the bits, of a kernel are those of MONAI's `gaussian_1d`: importing MONAI costs every process that
reads an image several CPU-seconds.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SQRT_HALF = 0.70710678


def reading_weights(places: NDArray[np.float64], size: int, sigma: float) -> Tensor:
    """Matrix float32 [places, size] that blurs an axis of `size` voxels and interpolates it linearly at places.

    Blur and interpolation of an axis are those of `blur` with `replicate` and of `resample`, in one product.

    Args:
        places: In voxels of the axis; outside is 0.
        sigma: Standard deviation of the blur in voxels; none with 0.
    """
    kernel = gaussian_kernel(sigma).numpy() if sigma else np.ones(1)
    taps = np.arange(len(kernel)) - len(kernel) // 2
    weights, rows = np.zeros((len(places), size)), np.arange(len(places))[:, None]
    lower = np.floor(places)
    for voxel, share in ((lower, 1.0 - (places - lower)), (lower + 1, places - lower)):
        inside = np.where((voxel >= 0) & (voxel < size), share, 0.0)
        columns = np.clip(voxel[:, None] + taps, 0, size - 1).astype(np.int64)
        np.add.at(weights, (rows, columns), inside[:, None] * kernel)
    return torch.from_numpy(weights.astype(np.float32))


def gaussian_kernel(sigma: float, *, cut_off: float = 4.0) -> Tensor:
    """A Gaussian of standard deviation `sigma` voxels, integrated over each voxel: float32 [odd size].

    Args:
        cut_off: Half width of the kernel, in standard deviations.
    """
    deviation = torch.tensor(sigma, dtype=torch.float)
    tail = int(max(float(np.float32(sigma)) * cut_off, 0.5) + 0.5)
    voxels = torch.arange(-tail, tail + 1, dtype=torch.float)
    scale = _SQRT_HALF / deviation
    return (0.5 * ((scale * (voxels + 0.5)).erf() - (scale * (voxels - 0.5)).erf())).clamp(min=0.0)
