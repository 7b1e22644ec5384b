"""Preprocessed images of a site, one memory-mapped `.npy` file per stream, built once and shared by processes.

`cache_file.py` tells what a file holds, `cache_build.py` writes it.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.config import SiteConfig, StreamConfig, load_site, site_path
from panfm.data.cache_file import LEAVES_OUT, CachedStream, behind, digests_of
from panfm.data.manifest import Row, image_path, read_manifest
from panfm.data.packed import FLOAT16, TYPES, PackedImages
from panfm.data.readers import ImageError, ImageReader, find_reader
from panfm.data.store import Images, ImageStore
from panfm.errors import DataError

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
            floats = FLOAT16 if site.float_images == "float16" else TYPES[32]
            cached[stream] = CachedStream(
                cache_dir, stream, config, sources, site.constant_images == "take", threads, floats
            )
            holders[stream] = np.array([position[row.subject] for row in stream_rows], dtype=np.int64)
            if any(row.session for row in stream_rows):
                sessions[stream] = [row.session for row in stream_rows]
    if not all(prepared.file.exists() for prepared in cached.values()):
        from panfm.data.cache_build import make_room  # a warm cache does not need it

        make_room(list(cached.values()), site.limits.cache_gib)
    images = {stream: _open(prepared, progress) for stream, prepared in cached.items()}
    digests = {stream: digests_of(prepared) for stream, prepared in cached.items()}
    _refuse_twins(cached, digests)
    return ImageStore(tuple(splits), tuple(splits.values()), images, holders, sessions, digests)


def _open(cached: CachedStream, progress: Progress | None) -> Images:
    """Memory-mapped images [P, C, *shape], read-only."""
    if not cached.is_whole(cached.kept_type):
        from panfm.data.cache_build import build  # a warm cache does not need it

        build(cached, progress)
    with suppress(PermissionError):  # another account's file
        os.utime(cached.file, ns=(time.time_ns(), cached.file.stat().st_mtime_ns))
    images: NDArray[Any] = np.load(cached.file, mmap_mode="r")
    if images.dtype == np.float32:
        return images
    ranges = np.frombuffer(behind(cached), "<f4", 2 * len(images)).reshape(-1, 2)
    return PackedImages(images, ranges)


def _refuse_twins(cached: Mapping[str, CachedStream], digests: Mapping[str, Sequence[bytes]]) -> None:
    """Raise DataError if two images have the same content."""
    seen: dict[bytes, Path] = {}
    for stream, prepared in cached.items():
        for (path, _), digest in zip(prepared.sources, digests[stream], strict=True):
            if (first := seen.setdefault(digest, path)) is not path:
                remedy = f"an image of its own ({LEAVES_OUT})"
                raise DataError(f"{path}: found the same content as {first}, expected {remedy}")


def _source(folder: Path, site: SiteConfig, row: Row) -> tuple[Path, ImageReader]:
    """Path of a row's image, and its reader. Raises DataError: no reader accepts it."""
    path = image_path(folder, site, row.path)
    try:
        return path, find_reader(path)
    except ImageError as error:
        raise DataError(f"{Path(site.manifest).name}:{row.line}: {path}: {error}") from error
