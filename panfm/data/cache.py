"""Preprocessed images of a site, one memory-mapped `.npy` file per stream, built once and shared by processes.

A file's name carries two hashes: of the stream's settings with the preprocessing version, and of the fingerprints that
the images' readers take. Whatever changes, the name changes with it: a stale file is never read, and is removed once
the new one is there. Files appear by rename, so that a reader sees a whole one or none; two processes that build the
same one write the same bytes, and the last rename wins.

A run decides how large its images are, so their size is counted before the first is read, and the files of other runs
make room: those longest unused go first.

An image that is the same all over is refused. One that is so only in the part that the run shows is told in the log: a
server that chooses the part could find by refusals what an image shows where.

Behind the images a file holds a hash of each one's content before it was prepared, so that an image that stands under
two subjects, or twice under one, is refused wherever data is opened.
"""

import hashlib
import io
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from panfm.config import SiteConfig, StreamConfig, dump_toml, load_site, site_path
from panfm.data.ahead import done_ahead
from panfm.data.content import DIGEST_BYTES
from panfm.data.intensity import EMPTY_PART, is_constant
from panfm.data.manifest import Row, image_path, read_manifest
from panfm.data.readers import ImageError, ImageReader, find_reader
from panfm.data.store import ImageStore
from panfm.errors import DataError, LimitError, reason
from panfm.files import open_atomic

PREPROCESSING_VERSION = 2
"""To be raised whenever `panfm.data.read` would give other values for the same file."""
_MAX_FILES = 1000
"""Files of one cache folder."""
_SPARE_BYTES = 2 << 30
"""Of the disk that images leave free, for ledger and private state; of a small disk, a twentieth."""
_LEAVES_OUT = "panfm site check --quarantine leaves it out"
_STALE_S = 3600.0
"""An unfinished file that nobody has written to for so long was left behind by a process that was killed."""

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (stream, images done, images in all)."""


def open_store(folder: Path, streams: Mapping[str, StreamConfig], *, progress: Progress | None = None) -> ImageStore:
    """Images of a site's subjects for the streams of a run; builds what the cache lacks.

    Rows in `quarantine.csv` and rows of other streams are left out, and with them subjects who have no other row.

    Guarantees:
        order: subjects as they first appear in the manifest; rows of a stream ascend.
        atomic: a build that fails or is killed leaves nothing that a later one would read.
    Raises:
        ConfigError: `site.toml` does not hold.
        DataError: the manifest or an image does not hold, two images are one, no row is left, or the cache cannot be
            written.
        LimitError: the images would fill more than the site's `limits.cache-gib`.
    """
    site = load_site(folder)
    manifest = read_manifest(folder, site)
    rows = [row for row in manifest if row.stream in streams]
    if not rows:
        raise DataError(f"{folder}: found no image of the run's streams, expected one of {', '.join(streams)}")
    wanted = {row.subject for row in rows}
    splits = {row.subject: row.split for row in manifest if row.subject in wanted}
    position = {subject: index for index, subject in enumerate(splits)}
    threads = max(1, site.limits.reading_threads)
    cached, holders, sessions = {}, {}, {}
    cache_dir = site_path(folder, site.cache_dir)
    for stream, config in streams.items():
        own = (row for row in rows if row.stream == stream)
        stream_rows = sorted(own, key=lambda row: (position[row.subject], row.session))
        if stream_rows:
            sources = [_source(folder, site, row) for row in stream_rows]
            cached[stream] = _Cached(cache_dir, stream, config, sources, site.constant_images == "take", threads)
            holders[stream] = np.array([position[row.subject] for row in stream_rows], dtype=np.int64)
            if any(row.session for row in stream_rows):
                sessions[stream] = [row.session for row in stream_rows]
    _make_room(list(cached.values()), site.limits.cache_gib)
    images = {stream: _open(prepared, progress) for stream, prepared in cached.items()}
    digests = {stream: _digests(prepared) for stream, prepared in cached.items()}
    _refuse_twins(cached, digests)
    return ImageStore(tuple(splits), tuple(splits.values()), images, holders, sessions, digests)


@dataclass(frozen=True)
class _Cached:
    """The prepared images of one stream: float32 [P, C, *shape] in a file."""

    folder: Path
    stream: str
    config: StreamConfig
    sources: Sequence[tuple[Path, ImageReader]]
    """Path of every image, and the reader that accepts it."""
    takes_constant: bool = False
    """Whether an image that has the same value everywhere is prepared like any other; else it is refused."""
    threads: int = 2
    """How many images are read at once."""

    @property
    def family(self) -> str:
        """Beginning of the names of files with the same settings."""
        of_inputs = dict.fromkeys(("input_centre", "input_scale", "input_constants"))
        prepared = self.config.model_copy(update=of_inputs)
        return f"{self.stream}.{_hash(str(PREPROCESSING_VERSION), self.stream, dump_toml(prepared))}"

    @cached_property
    def file(self) -> Path:
        """Path of the file, which may not be there yet."""
        return self.folder / f"{self.family}.{_hash(*starmap(_fingerprint, self.sources))}.npy"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sources), self.config.channels, *self.config.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return 4 * math.prod(self.shape)


def _make_room(cached: Sequence[_Cached], limit_gib: float) -> None:
    """Remove files of other runs, those longest unused first, until the images of this one have room.

    Raises:
        LimitError: they have not even if alone.
        DataError: the disk has not the space.
    """
    missing = [prepared for prepared in cached if not prepared.file.exists()]
    if not missing:
        return
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


def _open(cached: _Cached, progress: Progress | None) -> NDArray[np.float32]:
    """Memory-mapped float32 [P, C, *shape], read-only."""
    if not _is_whole(cached):
        with _atomic(cached.file) as part:
            _write(part, cached, progress)
        for stale in set(cached.folder.glob(f"{cached.family}.*.npy")) - {cached.file}:
            stale.unlink(missing_ok=True)
    with suppress(PermissionError):  # another account's file
        os.utime(cached.file, ns=(time.time_ns(), cached.file.stat().st_mtime_ns))
    images: NDArray[np.float32] = np.load(cached.file, mmap_mode="r")
    return images


def _is_whole(cached: _Cached) -> bool:
    """Whether the file is there with all that belongs in it; a disk that was full leaves a shorter one."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, _header(cached))
    size = len(header.getvalue()) + 4 * math.prod(cached.shape) + DIGEST_BYTES * len(cached.sources)
    try:
        with cached.file.open("rb") as file:
            return file.read(len(header.getvalue())) == header.getvalue() and cached.file.stat().st_size == size
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise DataError(f"{cached.file}: cannot be read ({reason(error)})") from error


def _header(cached: _Cached) -> dict[str, Any]:
    return {"descr": "<f4", "fortran_order": False, "shape": cached.shape}


def _digests(cached: _Cached) -> tuple[bytes, ...]:
    """Hashes of the content of a stream's images, which stand at the end of its file."""
    try:
        with cached.file.open("rb") as file:
            file.seek(-DIGEST_BYTES * len(cached.sources), os.SEEK_END)
            return tuple(file.read(DIGEST_BYTES) for _ in cached.sources)
    except OSError as error:
        raise DataError(f"{cached.file}: cannot be read ({reason(error)})") from error


def _refuse_twins(cached: Mapping[str, _Cached], digests: Mapping[str, Sequence[bytes]]) -> None:
    """Raise DataError if two images have the same content."""
    seen: dict[bytes, Path] = {}
    for stream, prepared in cached.items():
        for (path, _), digest in zip(prepared.sources, digests[stream], strict=True):
            if (first := seen.setdefault(digest, path)) is not path:
                remedy = f"an image of its own ({_LEAVES_OUT})"
                raise DataError(f"{path}: found the same content as {first}, expected {remedy}")


def _write(part: IO[bytes], cached: _Cached, progress: Progress | None) -> None:
    np.lib.format.write_array_header_1_0(part, _header(cached))
    digests: list[bytes] = []
    try:
        with closing(_read_all(cached)) as images:
            for image, digest in images:
                part.write(image.astype("<f4").tobytes())
                if is_constant(image):
                    logger.warning("%s: %s", cached.sources[len(digests)][0], EMPTY_PART)
                digests.append(digest)
                if progress:
                    progress(cached.stream, len(digests), len(cached.sources))
    except DataError as error:
        raise DataError(f"{error} ({_LEAVES_OUT})") from error
    part.write(b"".join(digests))


def _read_all(cached: _Cached) -> Generator[tuple[NDArray[np.float32], bytes]]:
    """Images in order, read by threads, a few ahead."""
    from panfm.data.read import read_with_digest  # a warm cache does not need it

    def read(source: tuple[Path, ImageReader]) -> tuple[NDArray[np.float32], bytes]:
        path, reader = source
        return read_with_digest(path, cached.stream, cached.config, reader, cached.takes_constant)

    return done_ahead(read, cached.sources, cached.threads)


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


def _source(folder: Path, site: SiteConfig, row: Row) -> tuple[Path, ImageReader]:
    """Path of a row's image, and its reader. Raises DataError: no reader accepts it."""
    path = image_path(folder, site, row.path)
    try:
        return path, find_reader(path)
    except ImageError as error:
        raise DataError(f"{Path(site.manifest).name}:{row.line}: {path}: {error}") from error


def _fingerprint(path: Path, reader: ImageReader) -> str:
    try:
        return reader.fingerprint(path)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
