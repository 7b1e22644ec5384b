"""The choice of a reader for a path, and what the check makes of sources that differ in name or packing only."""

import gzip
import shutil

import numpy as np
import pytest
from PIL import Image

from panfm.config import StreamConfig
from panfm.data.cache import open_store
from panfm.data.readers import ImageError, Volume, find_reader, read_source
from panfm.errors import DataError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"


@pytest.fixture
def files(site):
    """One volume and one picture under several names."""
    site.nifti("scan.nii.gz", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    folder = site.folder
    (folder / "scan.nii").write_bytes(gzip.decompress((folder / "scan.nii.gz").read_bytes()))
    for name in ("SCAN.NII.GZ", "scan", "scan.img.gz"):
        shutil.copy(folder / "scan.nii.gz", folder / name)
    shutil.copy(folder / "scan.nii", folder / "scan.dat")
    for name in ("chest.png", "CHEST.JPG", "chest.tif"):
        Image.fromarray(np.arange(20, dtype=np.uint8).reshape(5, 4)).save(folder / name)
    shutil.copy(folder / "chest.png", folder / "chest")
    return folder


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "SCAN.NII.GZ", "scan", "scan.img.gz", "scan.dat"])
def test_a_volume_by_any_name(files, name):
    image = read_source(files / name, is_volume=True)
    assert isinstance(image, Volume)
    np.testing.assert_array_equal(image.voxels, np.arange(60).reshape(3, 4, 5))
    with pytest.raises(ImageError, match="found a volume, expected a picture"):
        read_source(files / name, is_volume=False)


@pytest.mark.parametrize("name", ["chest.png", "CHEST.JPG", "chest.tif", "chest"])
def test_a_picture_by_any_name(files, name):
    assert read_source(files / name).size == (4, 5)
    with pytest.raises(ImageError, match="found a picture, expected a volume"):
        read_source(files / name, is_volume=True)


def test_a_fingerprint_changes_with_size_and_time(files):
    path = files / "scan.nii.gz"
    before = find_reader(path).fingerprint(path)
    status = path.stat()
    assert before == f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    path.write_bytes(path.read_bytes() + b"x")
    assert find_reader(path).fingerprint(path) != before
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        find_reader(path).fingerprint(path)


UNKNOWN = {
    "text": lambda path: path.write_text("I am no image"),
    "empty": lambda path: path.touch(),
    "folder": lambda path: path.mkdir(),
    "gzipped text": lambda path: path.write_bytes(gzip.compress(b"I am no image" * 100)),
    "a broken gzip stream": lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(20)),
    "the first bytes of a gzip stream": lambda path: path.write_bytes(b"\x1f\x8b"),
    "encapsulated PostScript, for which Pillow starts Ghostscript": lambda path: path.write_bytes(EPS),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_path_that_no_reader_accepts_is_one_line(site, kind):
    site.add("sound")
    site.row("a", "brain-xray", "series")
    UNKNOWN[kind](site.folder / "series")
    kinds = "expected a NIfTI file (.nii, .nii.gz) or a picture (PNG, JPEG,"
    line = site.assert_one_fault("manifest.csv:3: series: found a kind of image that no reader accepts, ")
    assert kinds in line
    site.assert_quarantine_leaves_one_row()
    stream = StreamConfig(shape=(8, 8), patch=(4, 4))
    (site.folder / "quarantine.csv").unlink()
    with pytest.raises(DataError, match=r"^manifest\.csv:3: .*/series: found a kind of image that no reader") as told:
        open_store(site.folder, {"brain-xray": stream})
    assert kinds in str(told.value)
    assert not (site.folder / ".panfm").exists()


def test_encapsulated_postscript_by_a_pictures_name(site):
    """Ghostscript is a program of its own that runs what the file says."""
    site.row("a", "brain-xray", "a.png")
    (site.folder / "a.png").write_bytes(EPS)
    site.assert_one_fault("a.png: found no readable picture")


def test_an_absent_path_without_a_suffix(site):
    site.row("a", path="series")
    site.assert_one_fault("manifest.csv:2: series: found no such file")


def test_the_same_volume_packed_otherwise_is_the_same(site):
    """Two patients with one scan tear the splits: it was seen only if the files had the same bytes."""
    site.add("a")
    content = gzip.decompress((site.folder / "a_brain-mr.nii.gz").read_bytes())
    (site.folder / "b.nii").write_bytes(content)
    site.row("b", path="b.nii")
    site.assert_one_fault("b.nii: found the same content as a_brain-mr.nii.gz")


@pytest.mark.parametrize("change", ["one voxel", "another shape"])
def test_another_volume_is_another(site, change):
    voxels = np.arange(96, dtype=np.int16).reshape(4, 4, 6)
    site.nifti("a.nii", voxels)
    other = voxels.reshape(4, 6, 4) if change == "another shape" else voxels.copy()
    other[0, 0, 0] = change == "one voxel"
    site.nifti("b.nii", other)
    site.row("a", path="a.nii")
    site.row("b", path="b.nii")
    assert site.check().exit_code == 0


@pytest.mark.parametrize("same", [True, False])
def test_pictures_are_the_same_by_their_pixels(site, same):
    site.row("a", "chest-xray", "a.png")
    site.row("b", "chest-xray", "b.bmp")
    pixels = np.arange(20, dtype=np.uint8).reshape(5, 4)
    Image.fromarray(pixels).save(site.folder / "a.png")
    Image.fromarray(pixels if same else pixels + 1).save(site.folder / "b.bmp")
    if same:
        site.assert_one_fault("b.bmp: found the same content as a.png")
    assert site.check().exit_code == int(same)
