"""Image readers: one file per kind of image on disk, all listed in `panfm.registry.READERS`."""

from panfm.data.readers.reader import (
    ImageError,
    ImageReader,
    Picture,
    Volume,
    file_fingerprint,
    find_reader,
    read_source,
    voxel_sizes,
)

__all__ = [
    "ImageError",
    "ImageReader",
    "Picture",
    "Volume",
    "file_fingerprint",
    "find_reader",
    "read_source",
    "voxel_sizes",
]
