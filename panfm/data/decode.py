"""Bytes of an image file to voxels, refusing what cannot be trusted. Knows no stream and needs no torch.

Every refusal is an `ImageError` that says what was found and what was expected. A file is read whole, so that a
truncated or corrupted one cannot pass.
"""

import errno
import gzip
import io
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.errors import DataError, PanfmError

SPACING_RANGE_MM = (0.01, 100.0)
"""A voxel size outside is a broken header."""
_LEAST_SINE = 0.5
"""Volume of a voxel over that of a box with its edges; a CT's tilted gantry leaves more than 0.8."""
LARGEST_BYTES = 4 * 2**30
"""Of a volume's file, unpacked; a few megabytes can be made to fill any memory."""
_BLOCK_BYTES = 1 << 20
_MOST_BEHIND = 1 << 20
"""Bytes that may follow the voxels."""
_ZLIB_NO_MEMORY = "Error -4 "


nib.imageglobals.logger.setLevel(logging.CRITICAL + 1)
"""What nibabel has to say of a header beside raising would be a second line about the same fault."""


class ImageError(DataError):
    """An image file does not hold what it should: what was `found` and what was `expected`."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.found, self.expected = found, expected


class Volume(NamedTuple):
    """A decoded NIfTI file."""

    voxels: NDArray[np.float32]
    """[X, Y, Z] as stored, scaled by the header's slope and intercept."""
    affine: NDArray[np.float64]
    """[4, 4], voxel index to mm in R, A, S."""


def read_bytes(path: Path) -> bytes:
    """Content of a file. Raises ImageError: absent, unreadable, or no file (a pipe would be waited for for ever)."""
    try:
        if path.exists() and not path.is_file():
            raise ImageError("a folder or device", "an image")
        if path.stat().st_size > LARGEST_BYTES:
            raise ImageError(f"more than {LARGEST_BYTES / 2**30:g} GiB", "one image")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError("no such file", "an image") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"a path that cannot be read ({type(error).__name__})", "an image") from error


def decode_volume(content: bytes) -> Volume:
    """Decode a NIfTI-1 or -2 file, gzipped or not.

    Guarantees:
        whole: the gzip checksum and the number of voxels have been verified.
        finite: no voxel and no affine entry is NaN or infinite.
        placed: the header states one orientation; the affine has an inverse, axes far from parallel, and voxel sizes in
            SPACING_RANGE_MM.
    Raises:
        ImageError: any of it does not hold.
    """
    raw = _unzip(content)
    image = _parse(raw)
    _check_shape(image.shape)
    _check_affine(image)
    if (announced := _announced_bytes(raw)) > len(raw):
        raise ImageError(f"voxels that cannot be read ({len(raw)} of {announced} bytes)", "a whole NIfTI file")
    with _file_at_fault("voxels that cannot be read", "a whole NIfTI file"):
        stored = np.asanyarray(image.dataobj).reshape(image.shape[:3])
    return Volume(_real(stored), np.asarray(image.affine, dtype=np.float64))


def decode_picture(content: bytes) -> Image.Image:
    """Decode a PNG, JPEG, ... of 8 bits per channel. Raises ImageError: it is none, or not whole."""
    with _file_at_fault("no readable picture", "a whole PNG or JPEG file"):
        image: Image.Image = Image.open(io.BytesIO(content))
        image.load()
    if image.mode.startswith(("I", "F")):
        raise ImageError(f"more than 8 bits per channel (mode {image.mode})", "a picture windowed to 8 bits")
    return image


def voxel_sizes(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel size in mm along each stored axis."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0))


@contextmanager
def _file_at_fault(found: str, expected: str) -> Iterator[None]:
    """Whatever a parser makes of broken bytes is the file's fault; memory that ran out, or a limit of ours, is not."""
    try:
        yield
    except (MemoryError, PanfmError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        if isinstance(error, zlib.error) and str(error).startswith(_ZLIB_NO_MEMORY):
            raise MemoryError from error
        raise ImageError(f"{found} ({_reason(error)})", expected) from error


def _unzip(content: bytes) -> bytes:
    """The content unpacked, block by block: no more is filled than the header announces."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    raw, announced = io.BytesIO(), -1
    with _file_at_fault("a broken gzip stream", "a whole .nii.gz file"), gzip.open(io.BytesIO(content)) as file:
        while block := file.read(_BLOCK_BYTES):
            announced = _announced_bytes(block) if announced < 0 else announced
            raw.write(block)
            if raw.tell() > LARGEST_BYTES:
                raise ImageError(f"more than {LARGEST_BYTES / 2**30:g} GiB when unpacked", "one volume")
            if raw.tell() > announced + _MOST_BEHIND:
                raise ImageError("more bytes than its header announces", f"{announced}")
    return raw.getvalue()


def _announced_bytes(start: bytes) -> int:
    """Size of a NIfTI file, by the header at its start."""
    kind = _kind(start)
    with _file_at_fault("a broken NIfTI header", "a NIfTI-1 or NIfTI-2 file"):
        header = kind.header_class(start[: kind.header_class.template_dtype.itemsize])
        shape, offset = header.get_data_shape(), int(header["vox_offset"])
        _check_shape(shape)
        return max(offset, 0) + math.prod(map(int, shape)) * header.get_data_dtype().itemsize


def _kind(start: bytes) -> Any:
    """The nibabel class of a file, by its first bytes."""
    if start[344:348] == b"n+1\0":
        return nib.Nifti1Image
    if start[4:8] == b"n+2\0":
        return nib.Nifti2Image
    raise ImageError("no NIfTI header", "a NIfTI-1 or NIfTI-2 file")


def _parse(raw: bytes) -> Any:
    with _file_at_fault("a broken NIfTI header", "a NIfTI-1 or NIfTI-2 file"):
        return _kind(raw).from_bytes(raw)


def _check_shape(shape: tuple[int, ...]) -> None:
    """Three axes; further ones of length 1 are tolerated, as scanners write them."""
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise ImageError(f"{len(shape)}D of shape {'x'.join(map(str, shape))}", "one 3D volume")


def _check_affine(image: Any) -> None:
    header, affine = image.header, image.affine
    if not (header["sform_code"] or header["qform_code"]):
        raise ImageError("no orientation (qform and sform codes are 0)", "a header that states one")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ImageError("a singular affine", "an affine that has an inverse")
    if header["sform_code"] and header["qform_code"]:
        _check_agreement(image)
    sizes, (low, high) = voxel_sizes(affine), SPACING_RANGE_MM
    if abs(np.linalg.det(affine[:3, :3])) < _LEAST_SINE * sizes.prod():
        raise ImageError("axes that are nearly parallel", "axes at right angles, or tilted")
    if sizes.min() < low or sizes.max() > high:
        raise ImageError(f"voxels of {' x '.join(f'{size:.4g}' for size in sizes)} mm", f"{low:g} to {high:g} mm")


def _check_agreement(image: Any) -> None:
    """Two statements of the orientation may differ by a tilt, not by an axis."""
    with _file_at_fault("a broken qform", "a header that states one orientation"):
        sform, qform = image.get_sform(), image.get_qform()
        if np.allclose(sform[:3, :3], qform[:3, :3], atol=1e-3):
            return
        axes = ["".join(nib.orientations.aff2axcodes(form)) for form in (sform, qform)]  # type: ignore[no-untyped-call]
    if axes[0] != axes[1]:
        raise ImageError(f"two orientations (sform {axes[0]}, qform {axes[1]})", "one orientation")


def _real(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype.kind not in "buif":
        raise ImageError(f"voxels of type {stored.dtype}", "real numbers")
    with np.errstate(over="ignore"):
        voxels = stored.astype(np.float32)
    broken = int((~np.isfinite(voxels)).sum())
    if broken:
        raise ImageError(f"{broken} voxels that are NaN or infinite", "finite voxels")
    return voxels


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
