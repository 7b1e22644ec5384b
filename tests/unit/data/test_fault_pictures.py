"""Kind 6: pictures as Pillow decodes them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from panfm.config import StreamConfig, parse_run
from panfm.data.check_outputs import inspect_output
from panfm.data.read import prepare_picture
from panfm.data.readers import ImageError
from panfm.data.readers.picture import decode_picture
from panfm.errors import ConfigError

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8))
DEEP = np.random.default_rng(0).integers(0, 4096, (8, 8)).astype(np.uint16)
GREY, COLOUR = StreamConfig(shape=(8, 8), patch=(4, 4)), StreamConfig(shape=(8, 8), patch=(4, 4), channels=3)


def png(channels, kind, *, depth=16, size=(2, 3)):
    """A PNG of a bit depth that Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width, height = size
    rows = b"".join(b"\0" + bytes(range(width * channels * depth // 8)) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(bits, channels, data, *, photometric, sample_format=1):
    """An uncompressed TIFF of one row."""
    entries = {256: (3, 1, len(data) * 8 // bits // channels), 257: (3, 1, 1), 259: (3, 1, 1), 278: (3, 1, 1)}
    entries |= {262: (3, 1, photometric), 277: (3, 1, channels), 279: (4, 1, len(data)), 339: (3, 1, sample_format)}
    behind = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries |= {258: (3, channels, bits if channels == 1 else behind), 273: (4, 1, behind + 2 * channels)}
    table = b"".join(
        struct.pack("<HHI", tag, kind, count)
        + (struct.pack("<HH", value, 0) if kind == 3 and count == 1 else struct.pack("<I", value))
        for tag, (kind, count, value) in sorted(entries.items())
    )
    start = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    return start + table + bytes(4) + struct.pack(f"<{channels}H", *[bits] * channels) + data


def saved(image, name, **options):
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def frames(name):
    return saved(RGB, name, save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180)])


COLOUR_16 = "16 bits per channel in colour or beside transparency"
REFUSED = {
    "PNG of 16-bit colour": (png(3, 2), COLOUR_16),
    "PNG of 16-bit grey and alpha": (png(2, 4), COLOUR_16),
    "PNG of 16-bit colour and alpha": (png(4, 6), COLOUR_16),
    "TIFF of 16-bit colour": (tiff(16, 3, bytes(range(12)), photometric=2), COLOUR_16),
    "PPM of 16-bit colour": (b"P6 2 1 65535\n" + bytes(range(12)), COLOUR_16),
    "PPM of 12-bit colour": (b"P6 2 1 4095\n" + bytes(12), COLOUR_16),
    "PGM that is stretched": (b"P5 2 1 4095\n" + bytes(4), "grey levels that are signed or stretched"),
    "TIFF of 16-bit grey with white as 0": (tiff(16, 1, bytes(8), photometric=0), "16-bit grey in which white is 0"),
    "TIFF of 32-bit integers": (saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "more than 8 bits per channel"),
    "TIFF of floats": (
        saved(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
        "more than 8 bits per channel (mode F)",
    ),
    "GIF of two frames": (frames("GIF"), "2 pictures in one file"),
    "TIFF of two pages": (frames("TIFF"), "2 pictures in one file"),
    "animated PNG": (frames("PNG"), "2 pictures in one file"),
    "animated WebP": (frames("WEBP"), "2 pictures in one file"),
    "JPEG of two pictures": (frames("MPO"), "2 pictures in one file"),
    "transparent PNG": (saved(RGB.convert("RGBA").point(lambda level: level // 2), "PNG"), "transparent pixels"),
    "transparent palette": (saved(RGB.convert("P"), "PNG", transparency=bytes([0] * 256)), "transparent pixels"),
    "transparent colour": (saved(RGB, "PNG", transparency=RGB.getpixel((0, 0))), "transparent pixels"),
    "transparent grey": (saved(Image.new("LA", (3, 3), (9, 99)), "PNG"), "transparent pixels"),
    "CMYK": (saved(RGB.convert("CMYK"), "JPEG"), "colours of mode CMYK"),
    "LAB": (saved(RGB.convert("LAB"), "TIFF"), "colours of mode LAB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pillow_would_change_is_refused(name):
    content, text = REFUSED[name]
    with pytest.raises(ImageError) as caught:
        decode_picture(content)
    assert text in str(caught.value)


def test_an_opaque_palette_is_read_without_a_warning_of_pillow(recwarn):
    palette = decode_picture(saved(RGB.convert("P"), "PNG", transparency=b"\xff" * 256))
    assert prepare_picture(palette, COLOUR).shape == (3, 8, 8)
    assert list(recwarn) == []


EIGHT = [png(1, 0, depth=2, size=(4, 1)), png(1, 0, depth=8), saved(RGB, "WEBP")]


@pytest.mark.parametrize("content", EIGHT, ids=["2-bit", "8-bit", "WebP"])
def test_eight_bits_or_fewer_are_read(content):
    assert decode_picture(content).mode in ("L", "RGB")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_changes_nothing(mode):
    plain = RGB if mode == "RGBA" else RGB.convert("L")
    read = decode_picture(saved(plain.convert(mode), "PNG"))
    np.testing.assert_array_equal(prepare_picture(read, COLOUR), prepare_picture(plain, COLOUR))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_and_told(name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    left_half = Image.fromarray(np.repeat([[255, 255, 255, 0, 0, 0]], 4, axis=0).astype(np.uint8)).convert("RGB")
    read = decode_picture(saved(left_half, name, exif=exif))
    assert read.size == ((6, 4) if orientation < 5 else (4, 6))
    levels = np.asarray(read.convert("L"), dtype=float)
    bright = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}[orientation]
    half = {"left": levels[:, :2], "right": levels[:, -2:], "top": levels[:2], "bottom": levels[-2:]}
    assert max(half, key=lambda side: half[side].mean()) == bright
    assert read.info.get("applied") == (
        f"turned as its EXIF orientation ({orientation}) says" if orientation > 1 else None
    )


@pytest.mark.parametrize("orientation", [0, 9, "6", b"6"])
def test_an_orientation_that_exif_does_not_have_is_none(monkeypatch, orientation):
    monkeypatch.setattr("panfm.data.readers.picture.ImageOps.exif_transpose", lambda *_, **__: None)
    monkeypatch.setattr(Image.Image, "getexif", lambda _: {0x0112: orientation})
    assert decode_picture(saved(RGB, "PNG")).info.get("applied") is None


@pytest.mark.parametrize("name", ["PNG", "TIFF", "JPEG2000", "PGM"])
def test_16_bit_grey_is_windowed(name):
    content = b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes() if name == "PGM" else saved(Image.fromarray(DEEP), name)
    read = decode_picture(content)
    own = np.clip((DEEP - np.percentile(DEEP, 1)) / np.ptp(np.percentile(DEEP, (1, 99))), 0, 1)
    np.testing.assert_allclose(prepare_picture(read, GREY)[0], own, atol=1e-5)
    window = GREY.model_copy(update={"window": (1000.0, 3000.0)})
    expected = np.clip((DEEP.astype(float) - 1000) / 2000, 0, 1)
    np.testing.assert_allclose(prepare_picture(read, window)[0], expected, atol=1e-5)
    np.testing.assert_allclose(prepare_picture(read, COLOUR), np.stack([own] * 3), atol=1e-5)


def test_a_window_that_shows_most_as_white_is_noted():
    window = GREY.model_copy(update={"window": (0.0, 1000.0)})
    picture = Image.fromarray(np.arange(0, 4096, 2, dtype=np.uint16).reshape(32, 64))
    assert inspect_output(picture, "chest-xray", GREY)[1] == (
        "16-bit grey, scaled by its own 1st to 99th percentile: the stream gives no window",
    )
    [note] = inspect_output(picture, "chest-xray", window)[1]
    assert note.endswith("% of its voxels at the top of the range: is its window too narrow?")


def test_signed_16_bit_grey_keeps_its_sign():
    read = decode_picture(tiff(16, 1, struct.pack("<4h", -1000, 0, 500, 1000), photometric=1, sample_format=2))
    config = StreamConfig(shape=(1, 4), patch=(1, 1), window=(-1000.0, 1000.0))
    np.testing.assert_allclose(prepare_picture(read, config).ravel(), [0, 0.5, 0.75, 1], atol=1e-5)


def test_a_constant_of_16_bits_is_zero():
    assert not prepare_picture(Image.fromarray(np.full((4, 4), 700, np.uint16)), GREY).any()


def test_the_check_tells_what_was_applied(site):
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(site.write() / "turned.png", exif=exif)
    Image.fromarray(DEEP).save(site.folder / "deep.png")
    (site.folder / "colour.png").write_bytes(png(3, 2))
    for name in ("turned", "deep", "colour"):
        site.row(name, "chest-xray", f"{name}.png")
    result = site.check()
    assert "note: turned.png: turned as its EXIF orientation (6) says" in result.output
    assert "note: deep.png: 16-bit grey, scaled by its own 1st to 99th percentile" in result.output
    site.assert_one_fault("colour.png: found 16 bits per channel in colour")


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (
            "shape = [8, 8], patch = [4, 4], window = [9.0, 9.0]",
            "window: only for 2D images, the lower grey level first",
        ),
        ("shape = [8, 8], patch = [4, 4], window = [0.0, 1e9]", "window"),
        ('shape = [8, 8], patch = [4, 4], nan = "zero"', "nan: only for volumes"),
        ("shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [1.0, 1.0, 1.0], window = [0.0, 9.0]", "window: only for"),
    ],
)
def test_options_that_do_not_hold(stream, text):
    with pytest.raises(ConfigError, match=text):
        parse_run(f'name = "r"\norgans = ["chest"]\n[streams]\nchest-xray = {{ {stream} }}\n')


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_picture_that_was_cut_off_is_refused(kind, share):
    """Pillow shows what there is of some of them, the rest grey."""
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)).save(whole, kind)
    with pytest.raises(ImageError):
        decode_picture(whole.getvalue()[: int(share * len(whole.getvalue()))])
