"""The file of one stream's prepared images in a site's cache: its name and what it holds.

A file's name carries two hashes: of the stream's settings with the preprocessing version, and of the fingerprints that
the images' readers take. Whatever changes, the name changes with it: a stale file is never read, and is removed once
the new one is there. Files appear by rename, so that a reader sees a whole one or none; two processes that build the
same one write the same bytes, and the last rename wins.

Images are kept in the type of their sources (`packed.py`), those of a stream in the widest of its images. Behind them a
file holds the range of each image, which integers need, and a hash of each one's content before it was prepared, so
that an image that stands under two subjects, or twice under one, is refused wherever data is opened.
"""

import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from panfm.config import StreamConfig, dump_toml
from panfm.data.content import DIGEST_BYTES
from panfm.data.packed import TYPES
from panfm.data.readers import ImageError, ImageReader, source_bits
from panfm.errors import DataError, reason

PREPROCESSING_VERSION = 4
"""To be raised whenever `panfm.data.read` would give other values for the same file."""
RANGE_BYTES = 8
LEAVES_OUT = "panfm site check --quarantine leaves it out"


@dataclass(frozen=True)
class CachedStream:
    """The prepared images of one stream: [P, C, *shape] in a file."""

    folder: Path
    stream: str
    config: StreamConfig
    sources: Sequence[tuple[Path, ImageReader]]
    """Path of every image, and the reader that accepts it."""
    takes_constant: bool = False
    """Whether an image that has the same value everywhere is prepared like any other; else it is refused."""
    threads: int = 2
    """How many images are read at once."""
    floats: np.dtype[Any] = TYPES[32]
    """Type of an image that is not of integers of 8 or 16 bits."""

    @property
    def family(self) -> str:
        """Beginning of the names of files with the same settings."""
        of_inputs = dict.fromkeys(("input_centre", "input_scale", "input_constants"))
        prepared = self.config.model_copy(update=of_inputs)
        version = f"{PREPROCESSING_VERSION} {self.floats}"
        return f"{self.stream}.{_hash(version, self.stream, dump_toml(prepared))}"

    @cached_property
    def file(self) -> Path:
        """Path of the file, which may not be there yet."""
        return self.folder / f"{self.family}.{_hash(*starmap(_fingerprint, self.sources))}.npy"

    @property
    def shape(self) -> tuple[int, ...]:
        """(P, C, *shape) of the array."""
        return (len(self.sources), self.config.channels, *self.config.shape)

    @cached_property
    def kept_type(self) -> np.dtype[Any]:
        """Type of the images in the file: the widest of their sources'."""
        types = {**TYPES, 32: self.floats}
        if there := [kept for kept in types.values() if self.is_whole(kept)]:
            return there[0]
        return types.get(max(starmap(source_bits, self.sources)), self.floats)

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return self.kept_type.itemsize * math.prod(self.shape)

    @property
    def behind_bytes(self) -> int:
        """Bytes of the ranges and hashes behind the array."""
        return (RANGE_BYTES + DIGEST_BYTES) * len(self.sources)

    def is_whole(self, kept: np.dtype[Any]) -> bool:
        """Whether the file is there in a type, with all that belongs in it; a full disk leaves a shorter one."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, header_of(self, kept))
        size = len(header.getvalue()) + kept.itemsize * math.prod(self.shape) + self.behind_bytes
        try:
            with self.file.open("rb") as file:
                return file.read(len(header.getvalue())) == header.getvalue() and self.file.stat().st_size == size
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({reason(error)})") from error


def header_of(cached: CachedStream, kept: np.dtype[Any]) -> dict[str, Any]:
    """Make the header of the file, which is numpy's format: type, order and shape of the images."""
    return {"descr": kept.str, "fortran_order": False, "shape": cached.shape}


def digests_of(cached: CachedStream) -> tuple[bytes, ...]:
    """Hashes of the content of a stream's images."""
    hashes = behind(cached)[RANGE_BYTES * len(cached.sources) :]
    return tuple(hashes[start : start + DIGEST_BYTES] for start in range(0, len(hashes), DIGEST_BYTES))


def behind(cached: CachedStream) -> bytes:
    """The ranges of a stream's images, float32 [P, 2], then the hashes of their content."""
    try:
        with cached.file.open("rb") as file:
            file.seek(-cached.behind_bytes, os.SEEK_END)
            return file.read()
    except OSError as error:
        raise DataError(f"{cached.file}: cannot be read ({reason(error)})") from error


def _fingerprint(path: Path, reader: ImageReader) -> str:
    try:
        return reader.fingerprint(path)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
