"""Builds the files of a cache: makes room for them, and reads and prepares the images.

A run decides how large its images are, so their size is counted before the first is read, and the files of other runs
make room: those longest unused go first.

An image that is the same all over is refused. One that is so only in the part that the run shows is told in the log: a
server that chooses the part could find by refusals what an image shows where.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from panfm.data.ahead import done_ahead
from panfm.data.cache_file import LEAVES_OUT, CachedStream, header_of
from panfm.data.intensity import EMPTY_PART, is_constant
from panfm.data.packed import TYPES, Packed
from panfm.data.read import read_with_digest
from panfm.data.readers import ImageReader
from panfm.errors import DataError, LimitError
from panfm.files import open_atomic

_MAX_FILES = 1000
"""Files of one cache folder."""
_SPARE_BYTES = 2 << 30
"""Of the disk that images leave free, for ledger and private state; of a small disk, a twentieth."""
_STALE_S = 3600.0
"""An unfinished file that nobody has written to for so long was left behind by a process that was killed."""

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (stream, images done, images in all)."""


def make_room(cached: Sequence[CachedStream], limit_gib: float) -> None:
    """Remove files of other runs, those longest unused first, until the images of this one have room.

    Raises:
        LimitError: they have not even if alone.
        DataError: the disk has not the space.
    """
    missing = [prepared for prepared in cached if not prepared.file.exists()]
    needed, limit = sum(prepared.size_bytes for prepared in cached), limit_gib * 2**30
    if needed > limit:
        public = f"this run's images are too large, this site's limits.cache-gib is {limit_gib:g}"
        raise LimitError(f"{public}; they fill {needed / 2**30:.6g} GiB", public=public)
    folder, new = cached[0].folder, sum(prepared.size_bytes for prepared in missing)
    others = _removable(folder, keep={prepared.file for prepared in cached})
    filled, spare = sum(status.st_size for _, status in others), _spare_bytes(folder)
    while others and (
        needed + filled > limit or len(others) + len(cached) > _MAX_FILES or new + spare > _free_bytes(folder)
    ):
        oldest, status = others.pop(0)
        logger.warning("%s: prepared images of another run, removed to make room", oldest.name)
        filled -= status.st_size
        with suppress(OSError):
            oldest.unlink()
    if new + spare > (free := _free_bytes(folder)):
        raise DataError(
            f"{folder}: found {free / 2**30:.3g} GiB free, expected {new / 2**30:.3g} for the run's images "
            f"and {spare / 2**30:.3g} to spare"
        )


def build(cached: CachedStream, progress: Progress | None) -> None:
    """Write the file of a stream, and remove those of the same settings that it replaces.

    Raises:
        DataError: an image does not hold, or the file cannot be written.
    """
    with _atomic(cached.file) as part:
        _write(part, cached, progress)
    for stale in set(cached.folder.glob(f"{cached.family}.*.npy")) - {cached.file}:
        stale.unlink(missing_ok=True)


def _removable(folder: Path, keep: set[Path]) -> list[tuple[Path, os.stat_result]]:
    """Files of other runs, and those that a killed process left unfinished; the longest unused first."""
    others = []
    for path in {*folder.glob("*.npy"), *folder.glob("*.part")} - keep:
        with suppress(FileNotFoundError):  # another process is at work
            status = path.stat()
            if path.suffix == ".npy" or time.time() - status.st_mtime > _STALE_S:
                others.append((path, status))
    return sorted(others, key=lambda other: other[1].st_atime)


def _free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds a folder, or will hold it."""
    return shutil.disk_usage(_nearest(folder)).free


def _spare_bytes(folder: Path) -> int:
    """Bytes of that disk that prepared images leave free."""
    return min(_SPARE_BYTES, shutil.disk_usage(_nearest(folder)).total // 20)


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _write(part: IO[bytes], cached: CachedStream, progress: Progress | None) -> None:
    np.lib.format.write_array_header_1_0(part, header_of(cached, cached.kept_type))
    ranges: list[tuple[float, float]] = []
    digests: list[bytes] = []
    try:
        with closing(_read_all(cached, cached.kept_type)) as images:
            for image, is_empty, digest in images:
                part.write(image.stored.tobytes())
                if is_empty:
                    logger.warning("%s: %s", cached.sources[len(digests)][0], EMPTY_PART)
                ranges.append((image.low, image.high))
                digests.append(digest)
                if progress:
                    progress(cached.stream, len(digests), len(cached.sources))
    except DataError as error:
        raise DataError(f"{error} ({LEAVES_OUT})") from error
    part.write(np.array(ranges, dtype="<f4").tobytes() + b"".join(digests))


def _read_all(cached: CachedStream, kept: np.dtype[Any]) -> Generator[tuple[Packed, bool, bytes]]:
    """Images in order as they are kept, whether they show one value all over, and the hash of their content; read by
    threads, a few ahead."""

    def read(source: tuple[Path, ImageReader]) -> tuple[Packed, bool, bytes]:
        path, reader = source
        image, digest = read_with_digest(path, cached.stream, cached.config, reader, cached.takes_constant)
        ends = np.array([image.stored.min(), image.stored.max()])
        return widened(image, kept), is_constant(image._replace(stored=ends).values()), digest

    return done_ahead(read, cached.sources, cached.threads)


def widened(image: Packed, kept: np.dtype[Any]) -> Packed:
    """The same image in a wider type; its values have the same bits, in float16 rounded."""
    if image.stored.dtype == kept:
        return image
    if (image.stored.dtype, kept) == (TYPES[8], TYPES[16]):
        return image._replace(stored=image.stored.astype(kept) * kept.type(257))
    return Packed.of(image.values(), kept, is_volume=True)


@contextmanager
def _atomic(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only when all of it is on the disk."""
    try:
        with open_atomic(file, mode=0o600) as part:
            yield part
    except OSError as error:
        raise DataError(
            f"{file.parent}: cannot hold the cache ({error.strerror}), expected a writable folder"
        ) from error
