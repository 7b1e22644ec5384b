"""One image file in, one array of a stream's shape out.

Volumes (NIfTI): decode -> intensity rule -> axes to R, A, S -> one resampling to the stream's spacing and shape about
the centre of the scan. What lies outside the scan is 0, the bottom of the intensity range. Where the target voxels are
coarser than the scan's, the scan is smoothed first, so that fine texture does not alias. Pictures (Pillow): grey or
colour, resized, / 255 whatever the modality, because an 8-bit picture has been windowed already.
"""

import gzip
import io
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.networks.layers.convutils import gaussian_1d
from monai.networks.layers.simplelayers import separable_filtering
from monai.networks.layers.spatial_transforms import AffineTransform
from numpy.typing import NDArray
from PIL import Image

from panfm.anatomy import Modality, parse_stream
from panfm.config import StreamConfig
from panfm.data.intensity import apply_intensity
from panfm.errors import DataError

SPACING_RANGE_MM = (0.01, 100.0)
"""A voxel size outside is a broken header."""
_SAME_SPACING = 1e-3


class ImageError(DataError):
    """An image file does not hold what its stream needs: what was `found` and what was `expected`."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.found, self.expected = found, expected


class Volume(NamedTuple):
    """A decoded NIfTI file."""

    voxels: NDArray[np.float32]
    """[X, Y, Z] as stored."""
    affine: NDArray[np.float64]
    """[4, 4], voxel index to mm in R, A, S."""


def read_image(path: Path, stream: str, config: StreamConfig) -> NDArray[np.float32]:
    """Read one image file as the stream's input.

    Returns:
        float32 [C, *config.shape] in [0, 1]; a volume's axes run R, A, S.
    Raises:
        DataError: the file is absent, unreadable, or does not hold such an image; the text begins with the path.
    """
    try:
        content = read_bytes(path)
        if config.is_volume:
            return prepare_volume(*decode_volume(content), stream, config)
        return decode_picture(content, config)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """Content of a file. Raises ImageError: absent or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError("no such file", "an image") from error
    except OSError as error:
        raise ImageError(f"a file that cannot be read ({type(error).__name__})", "an image") from error


def decode_volume(content: bytes) -> Volume:
    """Decode a NIfTI-1 or -2 file, gzipped or not, and refuse what cannot be trusted.

    Guarantees:
        whole: the gzip checksum and the number of voxels have been verified.
        finite: no voxel and no affine entry is NaN or infinite.
        placed: the header states an orientation; the affine has an inverse and a voxel size of SPACING_RANGE_MM.
    Raises:
        ImageError: any of it does not hold.
    """
    image = _parse(_unzip(content))
    _check_header(image)
    try:
        stored = np.asanyarray(image.dataobj)
    except Exception as error:  # whatever a parser makes of broken bytes, it is the file's fault
        raise ImageError(f"voxels that cannot be read ({_first_line(error)})", "a whole NIfTI file") from error
    voxels = _real(stored.reshape(stored.shape[:3]))
    return Volume(voxels, np.asarray(image.affine, dtype=np.float64))


def decode_picture(content: bytes, config: StreamConfig) -> NDArray[np.float32]:
    """Decode a PNG, JPEG, ... to float32 [C, *config.shape] in [0, 1]. Raises ImageError: it is no such picture."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            wide = image.mode.startswith(("I", "F"))
            mode = "L" if config.channels == 1 else "RGB"
            height, width = config.shape
            picture = None if wide else image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # as above
        raise ImageError(f"a file that is no picture ({_first_line(error)})", "PNG or JPEG") from error
    if picture is None:
        raise ImageError("more than 8 bits per channel", "an 8-bit picture (window it first)")
    pixels = np.asarray(picture).reshape(height, width, config.channels)
    return np.ascontiguousarray(apply_intensity(pixels, Modality.PHOTO).transpose(2, 0, 1))


def prepare_volume(
    voxels: NDArray[Any], affine: NDArray[np.float64], stream: str, config: StreamConfig
) -> NDArray[np.float32]:
    """Bring one volume, from a file or from memory, to the stream's orientation, spacing, shape and intensity range.

    Guarantees:
        exact: where the spacing matches already, voxels are cropped and padded, not interpolated (to 1e-5).
        deterministic: the same input gives the same bits.
    Args:
        voxels: [X, Y, Z], finite; HU for CT, raw values otherwise.
        affine: [4, 4], voxel index to mm in R, A, S; must have an inverse. Only axes and voxel size are used.
        stream: Its modality decides the intensity rule.
        config: Spacing in mm and shape wanted.
    Returns:
        float32 [1, *config.shape] in [0, 1].
    """
    scaled = apply_intensity(voxels, parse_stream(stream)[1])
    orientation = nib.orientations.io_orientation(affine)  # type: ignore[no-untyped-call]
    oriented = nib.orientations.apply_orientation(scaled, orientation)  # type: ignore[no-untyped-call]
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = voxel_sizes(affine)
    return _resample(oriented, spacing, config)


def voxel_sizes(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel size in mm along each stored axis."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0))


def _resample(volume: NDArray[np.float32], spacing: NDArray[np.float64], config: StreamConfig) -> NDArray[np.float32]:
    """Trilinear resampling that maps the centre of the scan to the centre of the result."""
    factor = np.asarray(config.spacing_mm) / spacing
    same = np.abs(factor - 1) < _SAME_SPACING
    factor[same] = 1.0
    offset = (np.asarray(volume.shape) - 1) / 2 - factor * (np.asarray(config.shape) - 1) / 2
    offset[same] = np.floor(offset[same])
    to_input = np.eye(4)
    to_input[:3, :3], to_input[:3, 3] = np.diag(factor), offset
    image = _smooth(torch.from_numpy(np.ascontiguousarray(volume))[None, None], factor)
    resample = AffineTransform(config.shape, normalized=False, reverse_indexing=True, align_corners=True)
    resampled = resample(image, torch.from_numpy(to_input).float())[0]
    return np.asarray(resampled.clamp_(0.0, 1.0).numpy(), dtype=np.float32)


def _smooth(image: torch.Tensor, factor: NDArray[np.float64]) -> torch.Tensor:
    """Gaussian blur of sigma (factor - 1) / 2 voxels along each axis that gets coarser."""
    sigmas = np.maximum((factor - 1) / 2, 0.0)
    if not sigmas.any():
        return image
    kernels = [gaussian_1d(torch.tensor(sigma)).float() if sigma else torch.ones(1) for sigma in sigmas]
    return torch.as_tensor(separable_filtering(image, kernels, mode="replicate"))


def _unzip(content: bytes) -> bytes:
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except Exception as error:  # EOFError, BadGzipFile, zlib.error
        raise ImageError(f"a broken gzip file ({_first_line(error)})", "a whole .nii.gz file") from error


def _parse(raw: bytes) -> Any:
    kinds = {raw[344:348] == b"n+1\0": nib.Nifti1Image, raw[4:8] == b"n+2\0": nib.Nifti2Image}
    if True not in kinds:
        raise ImageError("no NIfTI header", "a NIfTI-1 or NIfTI-2 file")
    try:
        return kinds[True].from_bytes(raw)
    except Exception as error:  # as above
        raise ImageError(f"a broken NIfTI header ({_first_line(error)})", "a NIfTI-1 or NIfTI-2 file") from error


def _check_header(image: Any) -> None:
    shape = image.shape
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or 0 in shape:
        raise ImageError(f"{len(shape)}D of shape {'x'.join(map(str, shape))}", "one 3D volume")
    header, affine = image.header, image.affine
    if not (header["sform_code"] or header["qform_code"]):
        raise ImageError("no orientation (qform and sform codes are 0)", "a header that states one")
    if affine is None or not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ImageError("a singular affine", "an affine that has an inverse")
    low, high = SPACING_RANGE_MM
    sizes = voxel_sizes(affine)
    if not ((sizes >= low) & (sizes <= high)).all():
        raise ImageError(f"voxels of {' x '.join(f'{size:.4g}' for size in sizes)} mm", f"{low:g} to {high:g} mm")


def _real(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype.kind not in "buif":
        raise ImageError(f"voxels of type {stored.dtype}", "real numbers")
    with np.errstate(over="ignore"):
        voxels = stored.astype(np.float32)
    broken = int((~np.isfinite(voxels)).sum())
    if broken:
        raise ImageError(f"{broken} voxels that are NaN or infinite", "finite voxels")
    return voxels


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
