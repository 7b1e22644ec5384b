"""Identity of an image: a hash of its voxels or pixels, however they are packed, stored or named."""

import hashlib

import nibabel as nib
import numpy as np

from panfm.data.readers import Picture, Volume

DIGEST_BYTES = 16


def content_digest(image: Volume | Picture) -> bytes:
    """Hash the decoded content of an image.

    Guarantees:
        content only: neither file format, compression, voxel type, order of the stored axes, voxel size nor place in
            the scanner changes it; of a picture, neither palette nor grey that is stored as colour.
    """
    if isinstance(image, Volume):
        axes = nib.orientations.io_orientation(image.affine)  # type: ignore[no-untyped-call]
        values = nib.orientations.apply_orientation(image.voxels, axes) + np.float32(0.0)  # type: ignore[no-untyped-call]
    elif image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int32)
    else:
        values = np.asarray(image.convert("RGB"))
        if (values == values[..., :1]).all():
            values = values[..., 0]
    digest = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=DIGEST_BYTES)
    digest.update(repr(values.shape).encode())
    return digest.digest()
