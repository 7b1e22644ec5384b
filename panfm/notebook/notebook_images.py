"""Images as a notebook names them (files by stream, a site folder, a store), turned into stores of a few subjects."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from panfm.config import StreamConfig, load_site
from panfm.data.cache import open_store
from panfm.data.manifest import image_path, read_manifest
from panfm.data.read import read_image
from panfm.data.store import ImageStore
from panfm.errors import ConfigError

Place = str | os.PathLike[str]
"""A path as people write it."""
FilesByStream = Mapping[str, Place | Sequence[Place | None]]
"""Stream -> one subject's image, or one image per subject, None where a subject has none."""
Images = FilesByStream | Place | ImageStore
"""Files by stream, a site folder, or images that are read already."""
_AT_ONCE = 32
"""Subjects whose images are in memory at a time."""


def check_streams(known: Collection[str], names: Collection[str]) -> None:
    """Raise ConfigError if there is no name, or one that is no stream of the model."""
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"stream: found {unknown[0]!r:.80}, expected some of {', '.join(known)}")
    if not names:
        raise ConfigError(f"images: found none, expected some of {', '.join(known)}")


def files_of(images: FilesByStream | Place, streams: Mapping[str, StreamConfig]) -> dict[str, list[Path | None]]:
    """Stream -> path or None for every subject, or for every session of a site folder; all lists have one length.

    Raises:
        ConfigError: a stream is unknown, or the lists differ in length.
        ConfigError, DataError: the site folder does not hold.
    """
    if not isinstance(images, Mapping):
        return _files_of_site(Path(images), streams)
    check_streams(streams, images)
    files: dict[str, list[Path | None]] = {}
    for name, paths in images.items():
        listed = [paths] if isinstance(paths, str | os.PathLike) else paths
        files[name] = [None if path is None else Path(path) for path in listed]
    lengths = {name: len(paths) for name, paths in files.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        told = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise ConfigError(f"images: found lists of unlike length ({told}), expected one entry per subject in each")
    return files


def stores_of(
    images: Images, streams: Mapping[str, StreamConfig], *, may_be_empty: bool = False
) -> Iterator[ImageStore]:
    """Read images, a few subjects at a time where they are files; a site's come from its cache.

    Args:
        may_be_empty: Whether to accept a subject of files without any image.
    Raises:
        ConfigError, DataError: as `files_of`, or an image does not hold.
    """
    if isinstance(images, ImageStore):
        check_streams(streams, images.images)
        yield images
    elif isinstance(images, Mapping):
        files = files_of(images, streams)
        subjects = len(next(iter(files.values())))
        empty = [number for number, paths in enumerate(zip(*files.values(), strict=True)) if not any(paths)]
        if empty and not may_be_empty:
            raise ConfigError(f"images: found None in every stream at place {empty[0]} of the lists, expected an image")
        for first in range(0, subjects, _AT_ONCE):
            yield _store({name: paths[first : first + _AT_ONCE] for name, paths in files.items()}, streams)
    elif isinstance(images, str | os.PathLike) and not Path(images).is_file():
        yield open_store(Path(images), streams)
    else:
        given = f"a file ({images})" if isinstance(images, str | os.PathLike) else type(images).__name__
        expected = f"a site folder, or {{{next(iter(streams))!r}: [PATH, ...]}}"
        raise ConfigError(f"images: found {given:.200}, expected {expected}")


def _store(files: Mapping[str, Sequence[Path | None]], streams: Mapping[str, StreamConfig]) -> ImageStore:
    images, rows = {}, {}
    for name, paths in files.items():
        path_of_row = {row: path for row, path in enumerate(paths) if path is not None}
        if path_of_row:
            images[name] = np.stack([read_image(path, name, streams[name]) for path in path_of_row.values()])
            rows[name] = np.array([*path_of_row], dtype=np.int64)
    by_subject = zip(*files.values(), strict=True)
    subjects = tuple(str(next((path for path in paths if path is not None), "")) for paths in by_subject)
    return ImageStore(subjects, ("test",) * len(subjects), images, rows)


def _files_of_site(folder: Path, streams: Mapping[str, StreamConfig]) -> dict[str, list[Path | None]]:
    site = load_site(folder)
    rows = [row for row in read_manifest(folder, site) if row.stream in streams]
    order = {subject: number for number, subject in enumerate(dict.fromkeys(row.subject for row in rows))}
    visits = sorted({(order[row.subject], row.session) for row in rows})
    position = {visit: index for index, visit in enumerate(visits)}
    files: dict[str, list[Path | None]] = {row.stream: [None] * len(position) for row in rows}
    check_streams(streams, files)
    for row in rows:
        files[row.stream][position[order[row.subject], row.session]] = image_path(folder, site, row.path)
    return files
