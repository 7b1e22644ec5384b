"""Pictures of 8 bits per channel: PNG, JPEG, TIFF and a few more."""

import io
from pathlib import Path

from PIL import Image

from panfm.data.readers import ImageError, Picture, file_at_fault, file_fingerprint, first_bytes, read_bytes

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
"""Formats that Pillow may read. For some of the others it starts programs such as Ghostscript."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".jp2")
_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"GIF8", b"RIFF", b"P5", b"P6", b"\0\0\0\x0cjP  ")
"""First bytes of a picture by any other name."""


class PictureReader:
    """Reads one picture from a file."""

    kind = "a picture (PNG, JPEG, TIFF, BMP, GIF, WebP, PPM, JPEG 2000)"

    def accepts(self, path: Path) -> bool:
        """Whether the name, or else the first bytes, are those of a picture."""
        return path.name.lower().endswith(_SUFFIXES) or first_bytes(path, 16).startswith(_STARTS)

    def fingerprint(self, path: Path) -> str:
        """Path, size and time of change."""
        return file_fingerprint(path)

    def read(self, path: Path) -> Picture:
        """Read and decode the file. Raises ImageError as `decode_picture`, or the file cannot be read."""
        return decode_picture(read_bytes(path))


def decode_picture(content: bytes) -> Picture:
    """Decode a picture of 8 bits per channel. Raises ImageError: it is none, or not whole."""
    with file_at_fault("no readable picture", "a whole PNG or JPEG file"):
        image: Picture = Image.open(io.BytesIO(content), formats=_FORMATS)
        image.load()
    if image.mode.startswith(("I", "F")):
        raise ImageError(f"more than 8 bits per channel (mode {image.mode})", "a picture windowed to 8 bits")
    return image
