"""Turns one image, from disk or from memory, into the array that a stream's tokenizer reads.

Volumes: intensity rule -> axes to R, A, S -> one resampling to the stream's spacing and shape about the centre of the
scan. What lies outside the scan is 0, the bottom of the intensity range. Where the target voxels are coarser than the
scan's, the scan is smoothed first, so that fine texture does not alias, but not across slices. Pictures: grey or
colour, resized, / 255 whatever the modality, because an 8-bit picture has been windowed already; 16-bit grey is
windowed, then resized.
"""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from panfm.anatomy import Modality, parse_stream
from panfm.config import StreamConfig
from panfm.data.content import content_digest
from panfm.data.intensity import GREY_LEVELS, apply_intensity, check_varies, picture_levels
from panfm.data.packed import TYPES, Packed, integer_bits
from panfm.data.readers import (
    ImageError,
    ImageReader,
    Picture,
    Volume,
    find_reader,
    read_source,
    source_bits,
    voxel_sizes,
)
from panfm.data.resample import reading_weights
from panfm.errors import DataError

_SAME_SPACING = 1e-3
_COARSEST = 64.0
"""Voxels of a run over those of a scan, per axis, up to which the blur grows, since its memory grows with it. A scan is
not refused for it: a server that chooses the spacing could find the scan's by asking."""


def read_image(path: Path, stream: str, config: StreamConfig, reader: ImageReader | None = None) -> NDArray[np.float32]:
    """Read one image as the stream's input.

    Args:
        reader: The one that accepts the path; looked for when None.
    Returns:
        float32 [C, *config.shape] in [0, 1], rounded to as many bits as the source has; a volume's axes run R, A, S.
    Raises:
        DataError: the image is absent, unreadable, of another kind than the stream's, or does not come out finite; the
            text begins with the path.
    """
    return read_with_digest(path, stream, config, reader)[0].values()


def read_with_digest(
    path: Path, stream: str, config: StreamConfig, reader: ImageReader | None = None, may_be_constant: bool = True
) -> tuple[Packed, bytes]:
    """Read one image as `read_image` does, in the type of its source, and hash its content before it is prepared.

    Args:
        may_be_constant: Whether to accept an image that has the same value everywhere.
    Raises:
        DataError: as `read_image`; or the whole image has the same value everywhere, and may not.
    """
    try:
        reader = reader or find_reader(path)
        image = read_source(path, is_volume=config.is_volume, reader=reader, nan=config.nan)
        if not may_be_constant:
            _check_varies(image, stream, config)
        kept = TYPES.get(source_bits(path, reader), TYPES[32])
        return Packed.of(prepare(image, stream, config), kept, is_volume=config.is_volume), content_digest(image)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error


def _check_varies(image: Volume | Picture, stream: str, config: StreamConfig) -> None:
    """Raise ImageError if an image has the same value everywhere, judged by its least and greatest value."""
    if isinstance(image, Volume):
        modality = parse_stream(stream)[1]
        ends = np.array([limit.reduce(image.voxels, axis=None) for limit in (np.fmin, np.fmax)])
        check_varies(apply_intensity(ends, modality, nan_to_zero=True), modality)
    else:
        levels = picture_levels(image, config.channels, config.window)
        greatest = 1.0 if levels.mode == "F" else GREY_LEVELS[1]
        check_varies(np.array(levels.getextrema()) / greatest, Modality.PHOTO)


def prepare(image: Volume | Picture, stream: str, config: StreamConfig) -> NDArray[np.float32]:
    """Bring one decoded image to the stream's input. Raises ImageError: it does not come out finite."""
    prepared = prepare_volume(*image, stream, config) if isinstance(image, Volume) else prepare_picture(image, config)
    if not np.isfinite(prepared).all():
        raise ImageError("an image that does not come out finite when it is scaled and resampled", "finite numbers")
    return prepared


def prepare_volume(
    voxels: NDArray[Any], affine: NDArray[np.float64], stream: str, config: StreamConfig
) -> NDArray[np.float32]:
    """Bring one volume, from a file or from memory, to the stream's orientation, spacing, shape and intensity range.

    Guarantees:
        exact: where the spacing matches already, voxels are cropped and padded, not interpolated (to 1e-5).
        like files: a volume in memory gives the same bits as the NIfTI file it is written to.
    Args:
        voxels: [X, Y, Z], finite, or NaN where the stream's `nan` allows it; HU for CT, raw values otherwise.
        affine: [4, 4], voxel index to mm in R, A, S; must have an inverse. Only its axes and voxel sizes are used.
        stream: Its modality decides the intensity rule.
        config: Spacing in mm and shape wanted.
    Returns:
        float32 [1, *config.shape] in [0, 1], rounded to as many bits as integers have.
    """
    scaled = apply_intensity(voxels, parse_stream(stream)[1], nan_to_zero=config.nan == "zero")
    prepared = to_stream_grid(scaled, affine, config)
    return Packed.of(prepared, TYPES[integer_bits(np.asarray(voxels).dtype)], is_volume=True).values()


def to_stream_grid(
    voxels: NDArray[np.float32], affine: NDArray[np.float64], config: StreamConfig
) -> NDArray[np.float32]:
    """Reorient voxels [X, Y, Z] in [0, 1] to R, A, S and resample them to float32 [1, *config.shape]; 0 outside."""
    axes = nib.orientations.io_orientation(affine.astype(np.float32))  # type: ignore[no-untyped-call]
    oriented = nib.orientations.apply_orientation(voxels, axes)  # type: ignore[no-untyped-call]
    spacing = np.empty(3)
    spacing[axes[:, 0].astype(int)] = voxel_sizes(affine.astype(np.float32))  # as NIfTI stores it
    return _resample(oriented, spacing, config)


def prepare_picture(image: Picture, config: StreamConfig) -> NDArray[np.float32]:
    """Bring one picture, from a file or from memory, to the stream's shape: float32 [C, height, width] in [0, 1]."""
    height, width = config.shape
    picture = picture_levels(image, config.channels, config.window).resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture).reshape(height, width, -1)
    if picture.mode == "F":
        scaled = Packed.of(pixels, TYPES[16], is_volume=False).values()
    else:
        scaled = apply_intensity(pixels, Modality.PHOTO)
    return np.ascontiguousarray(np.broadcast_to(scaled, (height, width, config.channels)).transpose(2, 0, 1))


def to_scan(shape: tuple[int, ...], spacing: NDArray[np.float64], config: StreamConfig) -> NDArray[np.float64]:
    """Affine [4, 4] from voxel indices of a prepared volume to those of the scan, whose axes run R, A, S."""
    factor = np.asarray(config.spacing_mm) / spacing
    same = np.abs(factor - 1) < _SAME_SPACING
    factor[same] = 1.0
    offset = (np.asarray(shape) - 1) / 2 - factor * (np.asarray(config.shape) - 1) / 2
    offset[same] = np.floor(offset[same])
    to_input = np.eye(4)
    to_input[:3, :3], to_input[:3, 3] = np.diag(factor), offset
    return to_input


def _resample(volume: NDArray[np.float32], spacing: NDArray[np.float64], config: StreamConfig) -> NDArray[np.float32]:
    """Trilinear resampling that maps the centre of the scan to the centre of the result.

    An axis that gets coarser is blurred first, by a Gaussian of sigma (factor - 1) / 2 voxels, factor at most 64.
    """
    to_input = to_scan(volume.shape, spacing, config)
    coarser = np.diag(to_input)[:3].copy()
    if config.slices:
        coarser["RAS".index(config.slices)] = 1.0
    sigmas = np.maximum((np.minimum(coarser, _COARSEST) - 1) / 2, 0.0)
    image = torch.from_numpy(np.ascontiguousarray(volume))
    for axis, (start, factor) in enumerate(zip(to_input[:3, 3], np.diag(to_input), strict=False)):
        places = start + factor * np.arange(config.shape[axis])
        weights = reading_weights(places, volume.shape[axis], sigmas[axis])
        image = torch.tensordot(weights, image, dims=([1], [axis])).movedim(0, axis)
    return np.ascontiguousarray(image.clamp(0.0, 1.0)[None].numpy())
