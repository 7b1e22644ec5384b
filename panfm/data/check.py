"""The check a site runs before anything is trained: every row of the manifest, every image, every mask.

It reads the manifest, then all of each image once, header and voxels (a truncated file or a NaN hides behind a sound
header), then each mask. It resamples and writes nothing. Two images are the same if their decoded content is, however
they are packed.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from panfm.anatomy import parse_stream
from panfm.config import SiteConfig, StreamConfig, load_site
from panfm.data.manifest import Fault, Row, image_path, scan_manifest
from panfm.data.readers import ImageError, Picture, Volume, find_reader, read_source
from panfm.errors import LimitError

_THREADS = 4


@dataclass(frozen=True)
class SiteReport:
    """Sound and faulty images of a site."""

    site: str
    faults: tuple[Fault, ...]
    rows: tuple[Row, ...]
    """Sound rows, of all streams."""
    unused: tuple[str, ...]
    """Streams of sound rows that the run does not read."""

    @property
    def coverage(self) -> Mapping[tuple[str, str], int]:
        """(stream, split) -> subjects among the sound rows."""
        return Counter(
            (stream, split) for _, stream, split in {(row.subject, row.stream, row.split) for row in self.rows}
        )


def check_site(
    folder: Path,
    streams: Mapping[str, StreamConfig] | None = None,
    *,
    organs: Collection[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SiteReport:
    """Check everything a site would train on; faults come back as data.

    Args:
        folder: The site folder.
        streams: Streams of the run to check against, which decide whether an image must be a volume or a picture.
            Without it, either passes.
        organs: Organs of the run; a stream of another organ is a fault, while a stream of a known organ that the run
            does not read is only `unused`. Without it, any `<organ>-<modality>` passes.
        progress: Called with (images done, images in all).
    Raises:
        ConfigError: `site.toml` does not hold.
    """
    site = load_site(folder)
    rows, faults = scan_manifest(folder, site)
    all_faults = [*faults]
    digests: dict[bytes, Row] = {}
    for done, (row, outcome) in enumerate(_inspect_all(folder, site, rows, streams or {}, organs), start=1):
        twin = row if isinstance(outcome, Fault) else digests.setdefault(outcome, row)
        if isinstance(outcome, Fault):
            all_faults.append(outcome)
        elif twin is not row:
            all_faults.append(Fault(row.path, f"the same content as {twin.path}", "an image of its own", row))
        if progress:
            progress(done, len(rows))
    condemned = {fault.row for fault in all_faults}
    sound = tuple(row for row in rows if row not in condemned)
    unused = sorted({row.stream for row in sound} - set(streams or {})) if streams else []
    return SiteReport(site.name, tuple(all_faults), sound, tuple(unused))


def _inspect_all(
    folder: Path,
    site: SiteConfig,
    rows: tuple[Row, ...],
    streams: Mapping[str, StreamConfig],
    organs: Collection[str] | None,
) -> Iterator[tuple[Row, Fault | bytes]]:
    def inspect(row: Row) -> Fault | bytes:
        organ, _ = parse_stream(row.stream)
        if organs is not None and organ not in organs:
            return Fault(row.path, f"unknown stream {row.stream!r}", f"an organ of {', '.join(organs)}", row)
        config = streams.get(row.stream)
        return _inspect(folder, site, row, is_volume=config.is_volume if config else None)

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from zip(rows, pool.map(inspect, rows), strict=True)


def _inspect(folder: Path, site: SiteConfig, row: Row, *, is_volume: bool | None) -> Fault | bytes:
    """The first fault of one row's image and mask, or the digest of the image."""
    path, file = image_path(folder, site, row.path), f"{Path(site.manifest).name}:{row.line}: {row.path}"
    try:
        reader = find_reader(path)
        file = row.path
        image = read_source(path, is_volume=is_volume, reader=reader)
        if row.mask:
            file = row.mask
            _check_mask(image_path(folder, site, row.mask), image)
        return _digest(image)
    except ImageError as error:
        return Fault(file, error.given, error.expected, row)
    except MemoryError as error:
        raise LimitError(f"{file}: needs more memory than there is") from error


def _check_mask(path: Path, image: Volume | Picture) -> None:
    """Raise ImageError for a mask that is empty or does not lie on its image's grid."""
    source = read_source(path, is_volume=isinstance(image, Volume))
    mask = source.voxels if isinstance(source, Volume) else np.asarray(source.convert("L")).T
    shape = image.voxels.shape if isinstance(image, Volume) else image.size
    if mask.shape != shape:
        raise ImageError(
            f"a mask of shape {'x'.join(map(str, mask.shape))}", f"{'x'.join(map(str, shape))} as its image"
        )
    if not mask.any():
        raise ImageError("an empty mask", "at least one voxel above 0")


def _digest(image: Volume | Picture) -> bytes:
    """Hash of an image's voxels, or pixels, and of how they are to be read."""
    if isinstance(image, Volume):
        digest = hashlib.blake2b(np.ascontiguousarray(image.voxels.T).data, digest_size=16)
        digest.update(image.affine.tobytes() + repr(image.voxels.shape).encode())
    else:
        digest = hashlib.blake2b(image.tobytes(), digest_size=16)
        digest.update(repr((image.mode, image.size, image.getpalette())).encode())
    return digest.digest()
