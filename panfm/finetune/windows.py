"""Windows of scans that are larger than their stream's grid: drawn at random to train, overlapping to predict.

A window has the shape of the grid. Predictions of overlapping windows are averaged with weights that fall towards the
edges of each window. Positions, weights and numbers are those of MONAI's `sliding_window_inference` with
`mode="gaussian"` and an overlap of one half.

Shape legend: C channels, K classes, W windows, `*shape` voxels of a window, `*cover` voxels of the whole scan.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.config import StreamConfig
from panfm.data.masks import Classes, mask_to_grid, upright_grid
from panfm.data.read import prepare
from panfm.data.readers import Picture, Volume
from panfm.data.store import Batch, ImageStore
from panfm.finetune.task_heads import TaskHead, predict_rows
from panfm.models import PanModel

_OVERLAP = 0.5
_DEVIATION = 0.125
"""Standard deviation of the weights, as a share of a window's side."""
_LEAST_WEIGHT = 1e-3
_SAME_SIZE = 1e-3
"""Difference of two lengths, in voxels, that is rounding."""
_CHUNK = 4
"""Windows that are predicted at a time."""
_AT_MASK = 0.5
"""Share of the training windows that hold a voxel of a class."""


@dataclass(frozen=True)
class LargeImage:
    """A scan and its mask on a grid with the stream's spacing that covers the whole scan."""

    image: NDArray[np.float16]
    """[C, *cover]"""
    mask: NDArray[np.uint8]
    """Class indices [*cover]."""

    @classmethod
    def of(
        cls, image: Volume | Picture, mask: Classes, stream: str, values: Sequence[int], cover: StreamConfig
    ) -> "LargeImage":
        """Prepare a scan and its mask, see `covering` and `mask_to_grid`."""
        return cls(prepare(image, stream, cover).astype(np.float16), mask_to_grid(mask, image, values, cover))

    def window(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a window at random: image float32 [C, *shape] and class indices [*shape]. Half of the windows are placed
        so that they hold a random voxel of the mask, if there is any."""
        room = [total - side for total, side in zip(self.mask.shape, shape, strict=True)]
        at_mask, voxel, *places = torch.rand(2 + len(room), generator=generator).tolist()
        starts = [math.floor(place * (free + 1)) for place, free in zip(places, room, strict=True)]
        inside = np.flatnonzero(self.mask)
        if at_mask < _AT_MASK and len(inside):
            chosen = np.unravel_index(inside[int(voxel * len(inside))], self.mask.shape)
            starts = [
                min(max(int(one) - math.floor(place * side), 0), free)
                for one, place, side, free in zip(chosen, places, shape, room, strict=True)
            ]
        cut = tuple(slice(start, start + side) for start, side in zip(starts, shape, strict=True))
        image = torch.from_numpy(self.image[(slice(None), *cut)].astype(np.float32))
        return image, torch.from_numpy(self.mask[cut].copy())


def covering(image: Volume | Picture, config: StreamConfig) -> StreamConfig | None:
    """Enlarge the grid of a stream so that it covers a scan.

    Returns:
        The stream with a shape that covers the scan; None where it is a picture, or a volume that is longer than the
        grid by no more than one patch along every axis.
    """
    if not isinstance(image, Volume):
        return None
    voxels, spacing = upright_grid(image)
    sizes = np.array(voxels) * spacing / config.spacing_mm
    lengths = [max(side, math.ceil(size - _SAME_SIZE)) for size, side in zip(sizes.tolist(), config.shape, strict=True)]
    if all(length - side <= patch for length, side, patch in zip(lengths, config.shape, config.patch, strict=True)):
        return None
    return config.model_copy(update={"shape": tuple(lengths)})


def predict_map(
    head: TaskHead, model: PanModel, store: ImageStore, row: int, image: Volume | Picture, stream: str
) -> tuple[NDArray[np.float32], StreamConfig]:
    """Predict the classes of a scan.

    Args:
        store: Holds the streams of all subjects on their grids.
        row: Of the subject in the store.
        image: The subject's scan of the segmented stream.
    Returns:
        Probabilities [K, *shape], and the stream with the shape that they have.
    """
    config = model.stream_configs[stream]
    if (cover := covering(image, config)) is None:
        [[own]] = predict_rows(head, model, store, np.array([row]))
        return own, config
    others = store.batch([row])

    @torch.no_grad()
    def predict(windows: Tensor) -> Tensor:
        images = {
            name: of_stream.expand(len(windows), *of_stream.shape[1:]) for name, of_stream in others.images.items()
        }
        everybody = torch.arange(len(windows))
        batch = Batch(len(windows), images | {stream: windows}, dict.fromkeys(images, everybody))
        return head.probabilities(head(model, batch)).float().cpu()

    model.eval()
    return slide(predict, torch.from_numpy(prepare(image, stream, cover)), config.shape).numpy(), cover


def slide(predict: Callable[[Tensor], Tensor], image: Tensor, shape: Sequence[int]) -> Tensor:
    """Predict an image [C, *cover] by overlapping windows.

    Args:
        predict: From windows [W, C, *shape] to maps [W, K, *shape].
    Returns:
        Weighted mean of the maps [K, *cover].
    """
    starts = itertools.product(*map(window_starts, image.shape[1:], shape))
    cuts = [tuple(slice(at, at + side) for at, side in zip(corner, shape, strict=True)) for corner in starts]
    weights, total = window_weights(shape), torch.zeros(image.shape[1:])
    blended = torch.empty(0)
    for first in range(0, len(cuts), _CHUNK):
        chosen = cuts[first : first + _CHUNK]
        maps = predict(torch.stack([image[(slice(None), *cut)] for cut in chosen]))
        blended = blended if len(blended) else torch.zeros(maps.shape[1], *image.shape[1:])
        for cut, own in zip(chosen, maps, strict=True):
            blended[(slice(None), *cut)] += own * weights
            total[cut] += weights
    return blended / total


def window_starts(length: int, side: int) -> list[int]:
    """First voxels of the windows along one axis; the last window ends with the image."""
    step = max(int(side * (1.0 - _OVERLAP)), 1)
    return [min(start, length - side) for start in range(0, length - side + step, step)]


def window_weights(shape: Sequence[int]) -> Tensor:
    """Weights of a window's voxels [*shape]: a Gaussian around its centre."""
    weights = torch.ones(())
    for side in shape:
        places = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        weights = weights[..., None] * torch.exp(-places.square() / (2.0 * (_DEVIATION * side) ** 2))
    return weights.clamp_min(max(float(weights.min()), _LEAST_WEIGHT))
