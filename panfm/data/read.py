"""Turns one image, from disk or from memory, into the array that a stream's tokenizer reads.

Volumes: intensity rule -> axes to R, A, S -> one resampling to the stream's spacing and shape about the centre of the
scan. What lies outside the scan is 0, the bottom of the intensity range. Where the target voxels are coarser than the
scan's, the scan is smoothed first, so that fine texture does not alias. Pictures: grey or colour, resized, / 255
whatever the modality, because an 8-bit picture has been windowed already.

Intensities are brought to [0, 1]. CT and grey-level pictures have a fixed scale; MR and raw PET do not, so their scale
is the scan's own 1st and 99th percentile. The rules are those of DEX (arXiv 2605.21861, Methods); its z-score of raw
PET is dropped because the min-max that follows undoes it. PET must be raw counts: SUV are not recognised.
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
from panfm.data.readers import ImageError, ImageReader, Picture, Volume, read_source, voxel_sizes
from panfm.data.resample import blur, gaussian_kernel, resample
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
        float32 [C, *config.shape] in [0, 1]; a volume's axes run R, A, S.
    Raises:
        DataError: the image is absent, unreadable, or of another kind than the stream's; the text begins with the path.
    """
    try:
        image = read_source(path, is_volume=config.is_volume, reader=reader)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error
    return prepare_volume(*image, stream, config) if isinstance(image, Volume) else prepare_picture(image, config)


def prepare_volume(
    voxels: NDArray[Any], affine: NDArray[np.float64], stream: str, config: StreamConfig
) -> NDArray[np.float32]:
    """Bring one volume, from a file or from memory, to the stream's orientation, spacing, shape and intensity range.

    Guarantees:
        exact: where the spacing matches already, voxels are cropped and padded, not interpolated (to 1e-5).
        like files: a volume in memory gives the same bits as the NIfTI file it is written to.
    Args:
        voxels: [X, Y, Z], finite; HU for CT, raw values otherwise.
        affine: [4, 4], voxel index to mm in R, A, S; must have an inverse. Only its axes and voxel sizes are used.
        stream: Its modality decides the intensity rule.
        config: Spacing in mm and shape wanted.
    Returns:
        float32 [1, *config.shape] in [0, 1].
    """
    scaled = apply_intensity(voxels, parse_stream(stream)[1])
    affine = affine.astype(np.float32)  # as NIfTI stores it
    axes = nib.orientations.io_orientation(affine)  # type: ignore[no-untyped-call]
    oriented = nib.orientations.apply_orientation(scaled, axes)  # type: ignore[no-untyped-call]
    spacing = np.empty(3)
    spacing[axes[:, 0].astype(int)] = voxel_sizes(affine)
    return _resample(oriented, spacing, config)


def prepare_picture(image: Picture, config: StreamConfig) -> NDArray[np.float32]:
    """Bring one picture, from a file or from memory, to the stream's shape: float32 [C, height, width] in [0, 1]."""
    height, width = config.shape
    picture = image.convert("L" if config.channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture).reshape(height, width, config.channels)
    return np.ascontiguousarray(apply_intensity(pixels, Modality.PHOTO).transpose(2, 0, 1))


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
    """Trilinear resampling that maps the centre of the scan to the centre of the result."""
    to_input = to_scan(volume.shape, spacing, config)
    image = _smooth(torch.from_numpy(np.ascontiguousarray(volume))[None, None], np.diag(to_input)[:3])
    resampled = resample(image, to_input, config.shape)[0]
    return np.asarray(resampled.clamp_(0.0, 1.0).numpy(), dtype=np.float32)


def _smooth(image: torch.Tensor, factor: NDArray[np.float64]) -> torch.Tensor:
    """Gaussian blur of sigma (factor - 1) / 2 voxels along each axis that gets coarser, at most 64 times as coarse."""
    sigmas = np.maximum((np.minimum(factor, _COARSEST) - 1) / 2, 0.0)
    if not sigmas.any():
        return image
    kernels = [gaussian_kernel(sigma) if sigma else torch.ones(1) for sigma in sigmas]
    return blur(image, kernels, "replicate")


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
