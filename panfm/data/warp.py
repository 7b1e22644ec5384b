"""Resampling of image batches by an affine map, and blurring, with torch's own operations.

The formulas, and the bits, are those of MONAI's `AffineTransform` and `separable_filtering`: importing MONAI costs
every process that reads an image several CPU-seconds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from panfm.data.store import send


def resample(images: Tensor, to_input: NDArray[np.float64], shape: Sequence[int]) -> Tensor:
    """Read images at the voxels of another grid, by linear interpolation; outside the images is 0.

    Args:
        images: float32 [P, C, *input shape], two or three axes.
        to_input: [axes + 1, axes + 1], from a voxel index of the result to one of the input.
        shape: Voxels of the result.
    Returns:
        float32 [P, C, *shape].
    """
    axes = len(shape)
    matrix = torch.from_numpy(to_input).float()
    from_indices = torch.from_numpy(np.linalg.inv(_to_unit(shape).numpy()))
    unit = _to_unit(images.shape[2:]) @ matrix @ from_indices
    order = [*reversed(range(axes)), axes]  # torch counts the last axis first
    theta = unit[order][:, order][:axes].expand(len(images), -1, -1)
    grid = functional.affine_grid(theta, [*images.shape[:2], *shape], align_corners=False)
    return functional.grid_sample(images.contiguous(), grid, align_corners=False)


def _to_unit(shape: Sequence[int]) -> Tensor:
    """Matrix float32 [axes + 1, axes + 1] from voxel indices to coordinates that span [-1, 1] from edge to edge."""
    sizes = torch.tensor(shape, dtype=torch.float64)
    matrix = torch.diag(torch.cat([2.0 / sizes, torch.ones(1, dtype=torch.float64)]))
    matrix[:-1, -1] = 1.0 / sizes - 1.0
    return matrix.float()


def blur(images: Tensor, kernels: Sequence[Tensor], padding: str) -> Tensor:
    """Convolve images [P, C, *shape] with one kernel [odd size] per axis, the same for all channels.

    Args:
        padding: How an image goes on beyond its edges: `replicate` or `reflect`.
    """
    axes, channels = images.dim() - 2, images.shape[1]
    convolve = (functional.conv2d, functional.conv3d)[axes - 2]
    sent = [send(kernel, images.device).to(images.dtype) for kernel in kernels]
    kept = [(axis, kernel) for axis, kernel in enumerate(sent) if len(kernel) > 1]
    padded = images
    for axis, kernel in reversed(kept):
        around = [len(kernel) // 2 if other == axis else 0 for other in reversed(range(axes)) for _ in range(2)]
        padded = functional.pad(padded, around, mode=padding)
    for axis, kernel in kept:
        shape = [channels, 1, *(len(kernel) if other == axis else 1 for other in range(axes))]
        padded = convolve(padded, kernel.expand(channels, -1).reshape(shape), groups=channels)
    return padded
