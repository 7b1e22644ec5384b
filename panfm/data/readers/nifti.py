"""NIfTI-1 and -2 files, gzipped or not, refusing what cannot be trusted. Knows no stream and needs no torch.

A file is read whole, so that a truncated or corrupted one cannot pass.
"""

import gzip
import io
import logging
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from panfm.data.packed import integer_bits
from panfm.data.readers import (
    LARGEST_BYTES,
    ImageError,
    Volume,
    file_at_fault,
    file_fingerprint,
    first_bytes,
    read_bytes,
    voxel_sizes,
)

SPACING_RANGE_MM = (0.01, 100.0)
"""A voxel size outside is a broken header."""
_LEAST_SINE = 0.5
"""Volume of a voxel over that of a box with its edges; a CT's tilted gantry leaves more than 0.8."""
_SAME_SIZE = 0.01
"""Relative difference of two statements of a voxel size that is rounding."""
_UNITS_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""Codes of NIfTI: unknown (taken for mm, as everybody does), m, mm, um."""
_BLOCK_BYTES = 1 << 20
_MOST_BEHIND = 1 << 20
"""Bytes that may follow the voxels."""
_GZIP_START = b"\x1f\x8b"
_HEADER_BYTES = 540
_PACKED_BYTES = 1 << 12
"""Of a gzipped file, which hold the names at its start and the header."""

nib.imageglobals.logger.setLevel(logging.CRITICAL + 1)
"""What nibabel has to say of a header beside raising would be a second line about the same fault."""


class NiftiReader:
    """Reads one volume from a NIfTI file."""

    kind = "a NIfTI file (.nii, .nii.gz)"

    def accepts(self, path: Path) -> bool:
        """Whether the name, or else the first bytes, are those of a NIfTI file."""
        if path.name.lower().endswith((".nii", ".nii.gz")):
            return True
        return _header_class(_unzipped_start(first_bytes(path, _PACKED_BYTES))) is not None

    def fingerprint(self, path: Path) -> str:
        """Path, size, times of change and inode."""
        return file_fingerprint(path)

    def bits(self, path: Path) -> int:
        """Bits of the voxels, by the header; 32 if they are no integers of 8 or 16 bits, or the header is broken."""
        start = _unzipped_start(first_bytes(path, _PACKED_BYTES))
        try:
            return integer_bits(_raw_header(start).get_data_dtype())
        except Exception:  # the fault is told when the image is read
            return 32

    def read(self, path: Path) -> Volume:
        """Read and decode the file. Raises ImageError as `decode_volume`, or the file cannot be read."""
        return decode_volume(read_bytes(path))


def _unzipped_start(start: bytes) -> bytes:
    """The header at the start of a file, unpacked if it is gzipped; empty if it cannot be."""
    if not start.startswith(_GZIP_START):
        return start
    try:
        return zlib.decompressobj(wbits=31).decompress(start, _HEADER_BYTES)
    except zlib.error:
        return b""


def decode_volume(content: bytes) -> Volume:
    """Decode a NIfTI-1 or -2 file, gzipped or not.

    Guarantees:
        whole: the gzip checksum and the number of voxels have been verified.
        finite: no affine entry is NaN or infinite; voxels may be, see `read_source`.
        placed: the header states one orientation and, in sform, qform and pixdim, one voxel size; the affine is in mm,
            has an inverse, axes far from parallel, and voxel sizes in SPACING_RANGE_MM.
    Raises:
        ImageError: any of it does not hold.
    """
    raw = _unzip(content)
    image = _parse(raw)
    _check_shape(image.shape)
    affine = _affine_mm(image, _raw_header(raw))
    if (announced := _announced_bytes(raw)) > len(raw):
        raise ImageError(f"voxels that cannot be read ({len(raw)} of {announced} bytes)", "a whole NIfTI file")
    with file_at_fault("voxels that cannot be read", "a whole NIfTI file"):
        stored = np.asanyarray(image.dataobj).reshape(image.shape[:3])
    return Volume(_real(stored), affine)


def _unzip(content: bytes) -> bytes:
    """The content unpacked, block by block: no more is filled than the header announces."""
    if not content.startswith(_GZIP_START):
        return content
    raw, announced = io.BytesIO(), -1
    with file_at_fault("a broken gzip stream", "a whole .nii.gz file"), gzip.open(io.BytesIO(content)) as file:
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
    with file_at_fault("a broken NIfTI header", "a NIfTI-1 or NIfTI-2 file"):
        header = _raw_header(start)
        shape, offset, least = header.get_data_shape(), int(header["vox_offset"]), header.single_vox_offset
        _check_shape(shape)
        if offset < least:
            raise ImageError(f"voxels that begin in the header (vox_offset {offset})", f"{least} or more")
        return offset + math.prod(map(int, shape)) * header.get_data_dtype().itemsize


def _raw_header(start: bytes) -> Any:
    """The header at the start of a file, as it is written: nibabel would mend what it can, and tell nobody."""
    header_class = _kind(start).header_class
    return header_class(start[: header_class.template_dtype.itemsize], check=False)


def _kind(start: bytes) -> Any:
    """The nibabel class of a file, by its first bytes. Raises ImageError: it is no NIfTI file."""
    kind = _header_class(start)
    if kind is None:
        raise ImageError("no NIfTI header", "a NIfTI-1 or NIfTI-2 file")
    return kind


def _header_class(start: bytes) -> Any:
    if start[344:348] == b"n+1\0":
        return nib.Nifti1Image
    return nib.Nifti2Image if start[4:8] == b"n+2\0" else None


def _parse(raw: bytes) -> Any:
    with file_at_fault("a broken NIfTI header", "a NIfTI-1 or NIfTI-2 file"):
        return _kind(raw).from_bytes(raw)


def _check_shape(shape: tuple[int, ...]) -> None:
    """Three axes; further ones of length 1 are tolerated, as scanners write them."""
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise ImageError(f"{len(shape)}D of shape {'x'.join(map(str, shape))}", "one 3D volume")


def _affine_mm(image: Any, raw_header: Any) -> NDArray[np.float64]:
    """The affine in mm. Raises ImageError: it is not to be trusted."""
    header, affine = image.header, np.array(image.affine, dtype=np.float64)
    if not (header["sform_code"] or header["qform_code"]):
        raise ImageError("no orientation (qform and sform codes are 0)", "a header that states one")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ImageError("a singular affine", "an affine that has an inverse")
    if header["sform_code"] and header["qform_code"]:
        _check_agreement(image)
    if (unit := int(header["xyzt_units"]) & 7) not in _UNITS_MM:
        raise ImageError(f"a unit of length that NIfTI does not have ({unit})", "m, mm or um")
    affine[:3] *= _UNITS_MM[unit]
    stated = _UNITS_MM[unit] * np.asarray(raw_header["pixdim"][1:4], dtype=np.float64)
    sizes, (low, high) = voxel_sizes(affine), SPACING_RANGE_MM
    if abs(np.linalg.det(affine[:3, :3])) < _LEAST_SINE * sizes.prod():
        raise ImageError("axes that are nearly parallel", "axes at right angles, or tilted")
    if sizes.min() < low or sizes.max() > high:
        raise ImageError(f"voxels of {_sizes(sizes)} mm", f"{low:g} to {high:g} mm")
    if not np.allclose(stated, sizes, rtol=_SAME_SIZE, atol=0.0):
        raise ImageError(f"voxels of {_sizes(sizes)} mm by the affine, {_sizes(stated)} by pixdim", "one voxel size")
    return affine


def _check_agreement(image: Any) -> None:
    """Two statements of the orientation may differ by a tilt, not by an axis."""
    with file_at_fault("a broken qform", "a header that states one orientation"):
        sform, qform = image.get_sform(), image.get_qform()
        axes = ["".join(nib.orientations.aff2axcodes(form)) for form in (sform, qform)]  # type: ignore[no-untyped-call]
        turn = nib.orientations.io_orientation(np.linalg.inv(qform) @ sform)  # type: ignore[no-untyped-call]
    if not np.array_equal(turn, [[0, 1], [1, 1], [2, 1]]):
        raise ImageError(f"two orientations (sform {axes[0]}, qform {axes[1]})", "one orientation")


def _sizes(sizes: NDArray[np.float64]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def _real(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype.kind not in "buif":
        raise ImageError(f"voxels of type {stored.dtype}", "real numbers")
    with np.errstate(over="ignore"):
        return stored.astype(np.float32)
