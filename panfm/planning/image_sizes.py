"""Sizes of images, read from their headers: no voxel is decoded where the format tells its size."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.config import SiteConfig, load_site
from panfm.data.manifest import Row, image_path, read_manifest
from panfm.data.readers import ImageError, Picture, Volume, file_at_fault, find_reader, voxel_sizes
from panfm.data.readers.nifti import NiftiReader
from panfm.data.readers.picture import PictureReader
from panfm.errors import DataError

_COLOUR_BANDS = 3


@dataclass(frozen=True)
class ImageSize:
    """Size of one image."""

    shape: tuple[int, ...]
    """Voxels along R, A, S of a volume; height, width of a picture."""
    spacing_mm: tuple[float, ...] = ()
    """Voxel size on the same axes; empty of a picture."""
    channels: int = 1


@dataclass
class StreamSizes:
    """Sizes of the images of one stream at all sites."""

    sizes: list[ImageSize] = field(default_factory=list)
    by_site: Counter[str] = field(default_factory=Counter)
    """Site -> images."""


@dataclass(frozen=True)
class Survey:
    """What the sites hold."""

    streams: dict[str, StreamSizes]
    """By stream, in the order in which the sites name them."""
    train_subjects: dict[str, int]
    """Site -> subjects of its train split."""
    sites: dict[str, SiteConfig]
    example: dict[str, Path]
    """Stream -> one of its images."""
    faults: tuple[str, ...]
    """One line for each image whose size cannot be read."""


def survey_sites(folders: Sequence[Path], progress: Callable[[int, int], None] = lambda *_: None) -> Survey:
    """Read the sizes of all images of some sites.

    Args:
        progress: Called with (images done, images in all).
    Raises:
        ConfigError, DataError: `site.toml` or the manifest of a site does not hold, or two sites have one name.
        DataError: a site has no training subject, no image can be read, or a stream has pictures and volumes.
    """
    sites = {folder: load_site(folder) for folder in folders}
    if len({site.name for site in sites.values()}) < len(folders):
        raise DataError("two of the sites have the same name in site.toml, expected a name for each")
    rows = [(folder, row) for folder, site in sites.items() for row in read_manifest(folder, site)]
    streams: dict[str, StreamSizes] = {}
    example: dict[str, Path] = {}
    faults = []
    for done, (folder, row) in enumerate(rows, start=1):
        path = image_path(folder, sites[folder], row.path)
        try:
            size = read_size(path)
        except ImageError as error:
            faults.append(f"{path}: {error}")
            continue
        finally:
            progress(done, len(rows))
        stream = streams.setdefault(row.stream, StreamSizes())
        stream.sizes.append(size)
        stream.by_site[sites[folder].name] += 1
        example.setdefault(row.stream, path)
    if not streams:
        raise DataError(faults[0] if faults else "no image at any site, expected rows in manifest.csv")
    for name, stream in streams.items():
        if len({len(size.shape) for size in stream.sizes}) > 1:
            raise DataError(f"stream {name}: has volumes and pictures, expected one of them; name them apart")
    return Survey(
        streams, _train_subjects(rows, sites), {site.name: site for site in sites.values()}, example, tuple(faults)
    )


def read_size(path: Path) -> ImageSize:
    """Size of one image. Raises ImageError: it is absent, or its header is broken."""
    reader = find_reader(path)
    if isinstance(reader, NiftiReader) and path.name.lower().endswith((".nii", ".nii.gz")):
        with file_at_fault("a broken NIfTI header", "a NIfTI-1 or NIfTI-2 file"):
            header: Any = nib.load(path)
            return _of_volume(header.shape, np.asarray(header.affine))
    if isinstance(reader, PictureReader):
        with file_at_fault("no readable picture", "a whole PNG or JPEG file"), Image.open(path) as picture:
            return _of_picture(picture)
    image = reader.read(path)
    return _of_volume(image.voxels.shape, image.affine) if isinstance(image, Volume) else _of_picture(image)


def _train_subjects(rows: Sequence[tuple[Path, Row]], sites: dict[Path, SiteConfig]) -> dict[str, int]:
    subjects = {
        site.name: len({row.subject for at, row in rows if at == folder and row.split == "train"})
        for folder, site in sites.items()
    }
    for name, count in subjects.items():
        if not count:
            raise DataError(f"site {name}: no subject in split train, expected some in its manifest")
    return subjects


def _of_volume(shape: Sequence[int], affine: NDArray[np.float64]) -> ImageSize:
    if len(shape) < 3 or not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ImageError(f"{len(shape)}D of shape {'x'.join(map(str, shape))}", "one 3D volume with an orientation")
    axes = nib.orientations.io_orientation(affine)[:, 0].astype(int)  # type: ignore[no-untyped-call]
    spacing = voxel_sizes(affine)
    order = np.argsort(axes)
    return ImageSize(tuple(int(shape[axis]) for axis in order), tuple(float(spacing[axis]) for axis in order))


def _of_picture(picture: Picture) -> ImageSize:
    width, height = picture.size
    colour = len(picture.getbands()) >= _COLOUR_BANDS or picture.mode == "P"
    return ImageSize((height, width), channels=3 if colour else 1)
