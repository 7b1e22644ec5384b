"""Preprocessed images of a site, one memory-mapped `.npy` file per stream, built once and shared by processes.

A file's name carries two hashes: of the stream's settings with the preprocessing version, and of the manifest rows
with each image's size and time of change. Anything changed, and the name is another: a stale file is never read, and
is removed when its successor is there. Files appear by rename, so that a reader sees a whole one or none; two
processes that build the same one write the same bytes, and the last rename wins.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from panfm.config import StreamConfig, dump_toml, load_site, site_path
from panfm.data.manifest import image_path, read_manifest
from panfm.data.store import ImageStore
from panfm.errors import DataError

PREPROCESSING_VERSION = 1
"""To be raised whenever `panfm.data.read` would give other values for the same file."""
_THREADS = 2

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
        DataError: the manifest or an image does not hold, no row is left, or the cache cannot be written.
    """
    site = load_site(folder)
    manifest = read_manifest(folder, site)
    rows = [row for row in manifest if row.stream in streams]
    if not rows:
        raise DataError(f"{folder}: found no image of the run's streams, expected one of {', '.join(streams)}")
    wanted = {row.subject for row in rows}
    splits = {row.subject: row.split for row in manifest if row.subject in wanted}
    position = {subject: index for index, subject in enumerate(splits)}
    images, holders = {}, {}
    for stream, config in streams.items():
        held = sorted((row for row in rows if row.stream == stream), key=lambda row: position[row.subject])
        if held:
            paths = [image_path(folder, site, row.path) for row in held]
            images[stream] = _open_stream(site_path(folder, site.cache_dir), stream, config, paths, progress)
            holders[stream] = np.array([position[row.subject] for row in held], dtype=np.int64)
    return ImageStore(tuple(splits), tuple(splits.values()), images, holders)


def _open_stream(
    cache: Path, stream: str, config: StreamConfig, paths: Sequence[Path], progress: Progress | None
) -> NDArray[np.float32]:
    """Memory-mapped float32 [P, C, *shape], read-only."""
    family = f"{stream}.{_hash(str(PREPROCESSING_VERSION), stream, dump_toml(config))}"
    file = cache / f"{family}.{_hash(*map(_fingerprint, paths))}.npy"
    if not file.exists():
        with _atomic(file) as part:
            _write(part, stream, config, paths, progress)
        for stale in set(cache.glob(f"{family}.*.npy")) - {file}:
            stale.unlink(missing_ok=True)
    images: NDArray[np.float32] = np.load(file, mmap_mode="r")
    return images


def _write(
    part: IO[bytes], stream: str, config: StreamConfig, paths: Sequence[Path], progress: Progress | None
) -> None:
    from panfm.data.read import read_image  # MONAI takes seconds to import, and a warm cache does not need it

    shape = (len(paths), config.channels, *config.shape)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(part, header)
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, image in enumerate(pool.map(lambda path: read_image(path, stream, config), paths), start=1):
            part.write(image.astype("<f4").tobytes())
            if progress:
                progress(stream, done, len(paths))


@contextmanager
def _atomic(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only when all of it is on the disk."""
    part: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as opened:
            part = Path(opened.name)
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    except OSError as error:
        raise DataError(
            f"{file.parent}: cannot hold the cache ({error.strerror}), expected a writable folder"
        ) from error
    finally:
        if part:
            part.unlink(missing_ok=True)


def _fingerprint(path: Path) -> str:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found no such file, expected an image") from error
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
