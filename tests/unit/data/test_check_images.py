"""Broken images and masks, one by one, through the command a site operator types."""

import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest
from PIL import Image


def bad_image(make):
    """A case that adds one sound subject and one whose image `make(site, path)` breaks."""

    def build(site):
        site.add("sound")
        site.add("broken")
        make(site, site.folder / "broken_brain-mr.nii.gz")

    return build


def header_of(voxels=None, affine=None, **fields):
    def make(site, path):
        image = nib.Nifti1Image(np.zeros((3, 3, 3), np.int16) if voxels is None else voxels, None)
        image.header.set_sform(np.eye(4) if affine is None else affine, code=1)
        for name, value in fields.items():
            image.header[name] = value
        nib.save(image, path)

    return make


def with_bytes(change):
    return lambda site, path: path.write_bytes(change(path.read_bytes()))


def patched(offset, layout, *values):
    """Overwrite header bytes, past whatever a library would allow."""

    def change(content):
        raw = bytearray(gzip.decompress(content))
        struct.pack_into(layout, raw, offset, *values)
        return gzip.compress(bytes(raw))

    return with_bytes(change)


def nan_voxels(value):
    voxels = np.ones((4, 4, 4), np.float32)
    voxels[1, 2, 3] = value
    return header_of(voxels)


def two_orientations(site, path):
    image = nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), None)
    image.header.set_sform(np.eye(4), code=1)
    image.header.set_qform(np.diag([-1.0, 1.0, 1.0, 1.0]), code=1)
    nib.save(image, path)


def broken_qform(quaternion):
    return header_of(qform_code=1, quatern_b=quaternion)


BAD_IMAGES = {
    "truncated gzip": (with_bytes(lambda content: content[: len(content) // 2]), "broken gzip"),
    "gzip without its checksum": (with_bytes(lambda content: content[:-4]), "broken gzip"),
    "flipped bit": (with_bytes(lambda c: c[:-30] + bytes([c[-30] ^ 4]) + c[-29:]), "broken gzip"),
    "gzip of half a file": (
        with_bytes(lambda c: gzip.compress(gzip.decompress(c)[:600])),
        "voxels that cannot be read",
    ),
    "text": (lambda site, path: path.write_text("I am no image\n"), "no NIfTI header"),
    "empty": (lambda site, path: path.write_bytes(b""), "no NIfTI header"),
    "folder": (lambda site, path: (path.unlink(), path.mkdir()), "a folder or device"),
    "pipe, which nobody writes to": (lambda site, path: (path.unlink(), os.mkfifo(path)), "a folder or device"),
    "device without an end": (lambda site, path: (path.unlink(), path.symlink_to("/dev/zero")), "a folder or device"),
    "absent": (lambda site, path: path.unlink(), "no such file"),
    "2D": (header_of(np.zeros((4, 5), np.int16)), "2D of shape 4x5"),
    "4D": (header_of(np.zeros((4, 4, 4, 3), np.int16)), "4D of shape 4x4x4x3"),
    "no voxels": (patched(40, "<8h", 3, 0, 4, 4, 1, 1, 1, 1), "0x4x4"),
    "negative size": (patched(40, "<8h", 3, -4, 4, 4, 1, 1, 1, 1), "found"),
    "huge size": (patched(40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1), "voxels that cannot be read"),
    "unknown type": (patched(70, "<h", 999), "found"),
    "nine axes": (patched(40, "<h", 9), "found"),
    "complex": (header_of(np.zeros((3, 3, 3), np.complex64)), "complex64"),
    "colour": (header_of(np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "voxels of type"),
    "NaN": (nan_voxels(np.nan), "1 voxels that are NaN or infinite"),
    "infinite": (nan_voxels(np.inf), "1 voxels that are NaN or infinite"),
    "too large for float32": (header_of(np.full((2, 2, 2), 1e300)), "8 voxels that are NaN or infinite"),
    "singular affine": (header_of(affine=np.diag([1.0, 1.0, 0.0, 1.0])), "singular affine"),
    "affine of zeros": (patched(280, "<12f", *([0.0] * 12)), "singular affine"),
    "NaN affine": (patched(280, "<f", float("nan")), "singular affine"),
    "axes that are nearly parallel": (
        header_of(affine=np.array([[1, 0.9, 0, 0], [0, 0.4, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])),
        "axes that are nearly parallel",
    ),
    "no orientation": (header_of(sform_code=0, qform_code=0), "no orientation"),
    "two orientations": (two_orientations, "two orientations (sform RAS, qform LAS)"),
    "impossible qform beside a good sform": (broken_qform(2.0), "a broken qform (w2 should be positive"),
    "NaN qform beside a good sform": (broken_qform(np.nan), "a broken qform"),
    "voxels of a metre": (header_of(affine=np.diag([1.0, 1.0, 1000.0, 1.0])), "voxels of 1 x 1 x 1000 mm"),
    "voxels of a nanometre": (header_of(affine=np.diag([1e-6, 1.0, 1.0, 1.0])), "voxels of 1e-06 x 1 x 1 mm"),
    "copy of another": (
        lambda s, p: p.write_bytes((s.folder / "sound_brain-mr.nii.gz").read_bytes()),
        "same content as",
    ),
}


def with_mask(name, make):
    def build(site):
        site.add("sound")
        site.add("broken", mask=name)
        make(site)

    return build


BAD_MASKS = {
    "absent mask": (with_mask("mask.nii.gz", lambda site: None), "mask.nii.gz: found no such file"),
    "empty mask": (
        with_mask("mask.nii.gz", lambda site: site.nifti("mask.nii.gz", np.zeros((9, 8, 7), np.uint8))),
        "mask.nii.gz: found an empty mask",
    ),
    "mask of another shape": (
        with_mask("mask.nii.gz", lambda site: site.nifti("mask.nii.gz", np.ones((9, 8, 6), np.uint8))),
        "mask.nii.gz: found a mask of shape 9x8x6, expected 9x8x7",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image(site, name, capfd, caplog):
    make, text = BAD_IMAGES[name]
    bad_image(make)(site)
    assert site.assert_one_fault(text).startswith("broken_brain-mr.nii.gz: ")
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")  # no library talks past us
    site.assert_quarantine_leaves_one_row()


def test_a_tilted_gantry_is_no_fault(site):
    tilt = np.deg2rad(30)
    site.write()
    site.nifti(
        "tilted.nii.gz",
        np.arange(64, dtype=np.int16).reshape(4, 4, 4),
        np.array([[1, 0, 0, 0], [0, 1, np.sin(tilt), 0], [0, 0, np.cos(tilt), 0], [0, 0, 0, 1.0]]),
    )
    site.row("a", path="tilted.nii.gz")
    assert site.check().exit_code == 0


def test_a_file_that_unpacks_without_end(site, monkeypatch):
    """Kilobytes that would fill the memory; one at the limit passes."""
    site.add("sound")
    size = len(gzip.decompress((site.folder / "sound_brain-mr.nii.gz").read_bytes()))
    monkeypatch.setattr("panfm.data.readers.nifti.LARGEST_BYTES", size)
    assert site.check().exit_code == 0
    monkeypatch.setattr("panfm.data.readers.nifti.LARGEST_BYTES", size - 1)
    site.assert_one_fault("GiB when unpacked")


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_mask(site, name):
    build, text = BAD_MASKS[name]
    build(site)
    site.assert_one_fault(text)
    site.assert_quarantine_leaves_one_row()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_deep_picture(site, mode):
    Image.fromarray(np.zeros((5, 4), np.int32 if mode == "I" else np.float32)).save(site.write() / "chest.tiff")
    site.row("a", "chest-xray", "chest.tiff")
    site.assert_one_fault(f"chest.tiff: found more than 8 bits per channel (mode {mode})")


def test_picture_and_its_mask(site):
    pixels = np.zeros((5, 4), np.uint8)
    Image.fromarray(pixels).save(site.write() / "mask.png")
    Image.fromarray(10 * np.arange(20, dtype=np.uint8).reshape(5, 4)).save(site.folder / "chest.png")
    site.row("a", "chest-xray", "chest.png", mask="mask.png")
    site.assert_one_fault("mask.png: found an empty mask")
    Image.fromarray(pixels.T + 1).save(site.folder / "mask.png")
    site.assert_one_fault("mask.png: found a mask of shape 5x4, expected 4x5 as its image")
    Image.fromarray(pixels + 1).save(site.folder / "mask.png")
    assert site.check().exit_code == 0
    (site.folder / "chest.png").write_bytes((site.folder / "chest.png").read_bytes()[:-20])
    site.assert_one_fault("chest.png: found no readable picture")
