"""Defines image readers, chooses the one for a path of the manifest, and holds the parts that readers of files share.

A path may be a file or a folder; its reader alone opens it. Every refusal is an `ImageError`.
"""

import errno
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.errors import DataError, PanfmError, reason
from panfm.registry import READERS

LARGEST_BYTES = 4 * 2**30
"""Of an image file, packed or unpacked; a few megabytes can be made to fill any memory."""
_ZLIB_NO_MEMORY = "Error -4 "
_OBJECT = re.compile(r" <[^<>]* object at 0x[0-9a-f]+>")
"""Name of an object in memory, as Pillow writes it into its messages."""

Picture = Image.Image
"""A decoded picture of 8 bits per channel."""


class ImageError(DataError):
    """An image cannot be used: what is `given`, and what was `expected` in its place."""

    def __init__(self, given: str, expected: str) -> None:
        super().__init__(f"found {given}, expected {expected}")
        self.given, self.expected = given, expected


class Volume(NamedTuple):
    """A decoded volume."""

    voxels: NDArray[np.float32]
    """[X, Y, Z] as stored, in HU for CT and raw values otherwise; finite, or NaN where nothing is known."""
    affine: NDArray[np.float64]
    """[4, 4], voxel index to mm in R, A, S; has an inverse."""


class ImageReader(Protocol):
    """Reads one kind of image, from a file or a folder. Made without arguments; used by several threads at once."""

    kind: str
    """The kind of image as operators are told of it: `a NIfTI file (.nii, .nii.gz)`."""

    def accepts(self, path: Path) -> bool:
        """Whether the path is of this kind, by its name or first bytes; whether it is sound shows when it is read."""
        ...

    def fingerprint(self, path: Path) -> str:
        """Text that changes whenever the image may have changed; pixels are not read. Raises ImageError: absent."""
        ...

    def read(self, path: Path) -> Volume | Picture:
        """Decode all of the image. Raises ImageError: it is absent, broken, or not to be trusted."""
        ...


@runtime_checkable
class TellsBits(Protocol):
    """A reader that knows how many bits its images have; others' images count as float32."""

    def bits(self, path: Path) -> int:
        """8 or 16 if the numbers of an image are integers of so many bits, as its first bytes say; else 32."""
        ...


def source_bits(path: Path, reader: ImageReader) -> int:
    """Bits of the numbers of an image: 8, 16 or 32."""
    return reader.bits(path) if isinstance(reader, TellsBits) else 32


def find_reader(path: Path) -> ImageReader:
    """The first registered reader that accepts a path; those of installed packages come last.

    Raises:
        ImageError: none does, or there is no such path.
        ConfigError: an installed reader cannot be imported.
    """
    kinds = []
    for reader in _readers():
        if reader.accepts(path):
            return reader
        kinds.append(reader.kind)
    with _told():
        if path.is_file():
            path.open("rb").close()
        path.stat()
    raise ImageError("a kind of image that no reader accepts", " or ".join(kinds))


def _readers() -> Iterator[ImageReader]:
    yield from (READERS.load(name)() for name in READERS.names)
    yield from (READERS.load(name)() for name in READERS.add_installed())


def read_source(
    path: Path, *, is_volume: bool | None = None, reader: ImageReader | None = None, nan: str | None = None
) -> Volume | Picture:
    """Read an image.

    Args:
        path: File or folder.
        reader: The one that accepts it; looked for when None.
        is_volume: Whether it must be a volume or a picture; either when None.
        nan: `zero` if a volume's NaN are background.
    Raises:
        ImageError: as the reader's, it is the other of the two, or a voxel is infinite, or NaN and not background.
    """
    image = (reader or find_reader(path)).read(path)
    if is_volume is not None and isinstance(image, Volume) != is_volume:
        raise ImageError(*(("a picture", "a volume") if is_volume else ("a volume", "a picture")))
    if isinstance(image, Volume):
        is_broken = np.isinf(image.voxels) if nan == "zero" else ~np.isfinite(image.voxels)
        if is_broken.any():
            hint = "" if np.isinf(image.voxels).any() else ' (nan = "zero" of the stream takes NaN as background)'
            raise ImageError(f"{is_broken.sum()} voxels that are NaN or infinite", f"finite voxels{hint}")
    return image


def voxel_sizes(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel size in mm along each stored axis."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0))


def read_bytes(path: Path) -> bytes:
    """Content of a file. Raises ImageError: absent, unreadable, or no file (reading a pipe would never end)."""
    with _told():
        if path.exists() and not path.is_file():
            raise ImageError("a folder or device", "an image")
        if path.stat().st_size > LARGEST_BYTES:
            raise ImageError(f"more than {LARGEST_BYTES / 2**30:g} GiB", "one image")
        return path.read_bytes()


def first_bytes(path: Path, number: int) -> bytes:
    """The beginning of a file; empty if it cannot be read."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(number)
    except (OSError, ValueError):
        return b""


def file_fingerprint(path: Path) -> str:
    """Path, size, times of change and inode of a file: another content shows though its size and time are put back.

    Raises:
        ImageError: it is not there, or cannot be looked at.
    """
    with _told():
        status = path.stat()
    return f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


@contextmanager
def file_at_fault(given: str, expected: str) -> Iterator[None]:
    """Turn what a parser raises on broken bytes into an ImageError; memory that ran out, or a limit, stays itself."""
    try:
        yield
    except (MemoryError, PanfmError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        if isinstance(error, zlib.error) and str(error).startswith(_ZLIB_NO_MEMORY):
            raise MemoryError from error
        told = " ".join(_OBJECT.sub("", str(error)).split())[:120] or type(error).__name__
        raise ImageError(f"{given} ({told})", expected) from error


@contextmanager
def _told() -> Iterator[None]:
    """Turn an error of the file system into an ImageError that gives the reason."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImageError("no such file", "an image") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"a path that cannot be read ({reason(error)})", "an image") from error
