"""Pictures of 8 bits per channel, or of 16-bit grey: PNG, JPEG, TIFF and a few more."""

import io
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from panfm.data.readers import ImageError, Picture, file_at_fault, file_fingerprint, first_bytes, read_bytes

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
"""Formats that Pillow may read. For some of the others it starts programs such as Ghostscript."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".jp2")
_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"GIF8", b"RIFF", b"P5", b"P6", b"\0\0\0\x0cjP  ")
"""First bytes of a picture by any other name."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
_DEEPEST = 255
_PHOTOMETRIC = 262
"""Tag of a TIFF file: 0 says that white is 0, which Pillow applies to 8 bits only."""
_CODESTREAM = b"\xff\x4f\xff\x51"
"""Start of JPEG 2000's own header; 42 bytes on, the depth of the first channel less 1, and its sign."""


class PictureReader:
    """Reads one picture from a file."""

    kind = "a picture (PNG, JPEG, TIFF, BMP, GIF, WebP, PPM, JPEG 2000)"

    def accepts(self, path: Path) -> bool:
        """Whether the name, or else the first bytes, are those of a picture."""
        return path.name.lower().endswith(_SUFFIXES) or first_bytes(path, 16).startswith(_STARTS)

    def fingerprint(self, path: Path) -> str:
        """Path, size, times of change and inode."""
        return file_fingerprint(path)

    def bits(self, path: Path) -> int:
        """Bits of a channel: 16 of grey levels that have them, else 8."""
        try:
            with Image.open(path, formats=_FORMATS) as image:
                return 16 if image.mode.startswith("I") else 8
        except Exception:  # the fault is told when the image is read
            return 16

    def read(self, path: Path) -> Picture:
        """Read and decode the file. Raises ImageError as `decode_picture`, or the file cannot be read."""
        return decode_picture(read_bytes(path))


def decode_picture(content: bytes) -> Picture:
    """Decode a picture of 8 bits per channel, or of 16-bit grey (mode I or I;16).

    Guarantees:
        as stored: no bits of the file are dropped, no transparent pixel counts, no further picture is ignored.
        upright: an EXIF orientation has been applied; `info["applied"]` tells it.
    Raises:
        ImageError: it is no picture, not whole, or one of these does not hold.
    """
    with file_at_fault("no readable picture", "a whole PNG or JPEG file"):
        image: Picture = Image.open(io.BytesIO(content), formats=_FORMATS)
        _check_depth(image, content)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise ImageError(f"{frames} pictures in one file", "one picture")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        image.load()
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ImageError("transparent pixels", "an opaque picture")
        image.info.pop("transparency", None)
        ImageOps.exif_transpose(image, in_place=True)
    if orientation in range(2, 9):
        image.info["applied"] = f"turned as its EXIF orientation ({orientation}) says"
    return image


def _check_depth(image: Picture, content: bytes) -> None:
    """Refuse a picture that Pillow would decode to fewer bits, other colours or inverted, before it is decoded."""
    tiles = getattr(image, "tile", [])
    args = tiles[0].args if tiles else ""
    stored, greatest = (args, 0) if isinstance(args, str) else (str(args[0]), args[1] if image.format == "PPM" else 0)
    is_grey, signed = image.mode.startswith("I"), False
    bits = 16 if ";16" in stored or ";12" in stored or greatest > _DEEPEST or is_grey else 8
    if (start := content.find(_CODESTREAM)) >= 0 and image.format == "JPEG2000":
        bits, signed = (content[start + 42] & 0x7F) + 1, content[start + 42] > 0x7F
    if image.mode == "F" or ";32" in stored or bits > 16:
        raise ImageError(f"more than 8 bits per channel (mode {image.mode})", "8 bits, or 16-bit grey")
    if bits > 8 and not is_grey:
        raise ImageError("16 bits per channel in colour or beside transparency", "8 bits per channel, or 16-bit grey")
    if signed or _DEEPEST < greatest < 65_535:
        raise ImageError("grey levels that are signed or stretched when they are read", "PNG or TIFF of 16-bit grey")
    if image.format == "TIFF" and is_grey and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        raise ImageError("16-bit grey in which white is 0", "black as 0")
    if not is_grey and image.mode not in _MODES:
        raise ImageError(f"colours of mode {image.mode}", "grey or RGB")
