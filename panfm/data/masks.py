"""Reads masks (the class of every voxel or pixel), and resamples them to a stream's grid and back.

A mask holds one whole number per voxel on the grid of its image; 0 is background. The column `mask` of a manifest names
its file.

Shape legend: K classes, background first; `*shape` voxels of the stream.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from panfm.config import StreamConfig
from panfm.data.read import to_scan, to_stream_grid
from panfm.data.readers import ImageError, Picture, Volume, read_source, voxel_sizes
from panfm.data.warp import resample

Classes = NDArray[np.int64]
_SAME_PLACE = 0.1
"""Of the smallest side of a voxel: how far the corners of a mask may lie from those of its image."""
_GREATEST = 65_535
_JPEG = b"\xff\xd8\xff"
_GREY = ("1", "L", "P", "I", "I;16")
"""Modes of Pillow with one number per pixel; in mode P the number is an index into a palette."""


def read_mask(path: Path, image: Volume | Picture) -> Classes:
    """Read the mask of an image.

    Returns:
        Numbers of the classes: [X, Y, Z] as stored, or [height, width].
    Raises:
        ImageError: it cannot be read, is not on the image's grid, or has other values than whole numbers of 0 to 65535.
    """
    source = read_source(path, is_volume=isinstance(image, Volume))
    if not isinstance(source, Volume) and path.read_bytes()[:3] == _JPEG:
        raise ImageError("a mask as JPEG, which changes numbers", "PNG")
    mask, shape = _numbers(source), image_shape(image)
    if mask.shape != shape:
        given, expected = (
            "x".join(map(str, reversed(size) if len(size) == 2 else size)) for size in (mask.shape, shape)
        )
        raise ImageError(f"a mask of shape {given}", f"{expected} as its image")
    if isinstance(source, Volume) and isinstance(image, Volume) and not _are_at_one_place(source, image):
        raise ImageError("a mask at another place than its image", "the affine of its image")
    strange = mask[(mask != np.rint(mask)) | (mask < 0) | (mask > _GREATEST)]
    if strange.size:
        raise ImageError(f"a mask that holds {strange[0]:g}", f"whole numbers of classes, 0 to {_GREATEST}")
    return mask.astype(np.int64)


def check_mask(path: Path, image: Volume | Picture) -> None:
    """Raise ImageError if `read_mask` does, or if the mask is empty."""
    if not read_mask(path, image).any():
        raise ImageError("an empty mask", "at least one voxel above 0")


def _are_at_one_place(mask: Volume, image: Volume) -> bool:
    last = np.array(image.voxels.shape) - 1
    corners = np.array([[*(last * corner), 1] for corner in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm((corners @ (mask.affine - image.affine).T)[:, :3], axis=1)
    return bool(apart.max() <= _SAME_PLACE * voxel_sizes(image.affine).min())


def image_shape(image: Volume | Picture) -> tuple[int, ...]:
    """Shape of an image: voxels (X, Y, Z) as stored, or pixels (height, width)."""
    return image.voxels.shape if isinstance(image, Volume) else (image.height, image.width)


def mask_to_grid(
    mask: Classes, image: Volume | Picture, values: Sequence[int], config: StreamConfig
) -> NDArray[np.uint8]:
    """Resample a mask to a stream's grid in the way of its image; each voxel gets the class that fills most of it.

    Args:
        mask: As `read_mask` returns it.
        values: Number of each class in the mask, background (0) first.
    Returns:
        Class indices (into `values`) [*config.shape]; background outside the image.
    """
    shares = [_to_grid((mask == value).astype(np.float32), image, config) for value in values[1:]]
    return np.stack([1.0 - np.sum(shares, axis=0), *shares]).argmax(axis=0).astype(np.uint8)


def mask_from_grid(probabilities: NDArray[np.float32], image: Volume | Picture, config: StreamConfig) -> Classes:
    """Resample predictions from a stream's grid to the grid of their image.

    Args:
        probabilities: float32 [K, *config.shape].
    Returns:
        Index of the likeliest class, [X, Y, Z] as stored or [height, width]; background outside the stream's grid.
    """
    if not isinstance(image, Volume):
        return _likeliest(_resized(own, image.size) for own in probabilities)
    axes = nib.orientations.io_orientation(image.affine.astype(np.float32))  # type: ignore[no-untyped-call]
    shape, spacing = upright_grid(image)
    to_grid = np.linalg.inv(to_scan(shape, spacing, config)).astype(np.float64)
    maps = (torch.from_numpy(own)[None, None] for own in probabilities)
    upright = _likeliest(resample(own, to_grid, shape)[0, 0].numpy() for own in maps)
    back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], axes)  # type: ignore[no-untyped-call]
    return np.ascontiguousarray(nib.orientations.apply_orientation(upright, back))  # type: ignore[no-untyped-call]


def upright_grid(image: Volume) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Number of voxels and voxel size in mm of a scan along R, A and S, as closely as its own axes run."""
    axes = nib.orientations.io_orientation(image.affine.astype(np.float32))  # type: ignore[no-untyped-call]
    along_stored = axes[:, 0].astype(int)
    spacing, shape = np.empty(3), np.empty(3, dtype=int)
    spacing[along_stored] = voxel_sizes(image.affine.astype(np.float32))
    shape[along_stored] = image.voxels.shape
    return tuple(shape.tolist()), spacing


def _likeliest(maps: Iterable[NDArray[np.float32]]) -> Classes:
    """For every voxel, index of the map with the greatest value, the first of equal ones. Keeps two maps in memory."""
    rest = iter(maps)
    best = next(rest)
    classes = np.zeros(best.shape, dtype=np.int64)
    for number, own in enumerate(rest, start=1):
        better = own > best
        classes[better] = number
        best = np.maximum(best, own)
    return classes


def _numbers(source: Volume | Picture) -> NDArray[Any]:
    """Values of a mask as its file has them."""
    if isinstance(source, Volume):
        return source.voxels
    if source.mode in _GREY:
        return np.asarray(source).astype(np.int64)
    colours = np.asarray(source.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise ImageError("a mask in colours", "one number of a class per pixel")
    return colours[..., 0]


def _to_grid(share: NDArray[np.float32], image: Volume | Picture, config: StreamConfig) -> NDArray[np.float32]:
    if isinstance(image, Volume):
        return to_stream_grid(share, image.affine, config)[0]
    return _resized(share, (config.shape[1], config.shape[0]))


def _resized(share: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a float picture to (width, height)."""
    return np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BILINEAR))
