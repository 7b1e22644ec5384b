"""Kind 10: a stale cache when size and time are kept."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from panfm.config import StreamConfig
from panfm.data.cache import open_store
from panfm.data.readers import file_fingerprint
from simulations.cohorts.cohort_source import listing_of
from tests.unit.data.conftest import STREAM


def put_back(path, change):
    """Run a change, and give the file the times that it had."""
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def overwrite(path, content):
    path.write_bytes(content)


def rename_over(path, content):
    other = path.with_suffix(".new")
    other.write_bytes(content)
    other.replace(path)


def copy_with_times(path, content):
    """Replace a file by another of the same size and times, as `cp --preserve` and `rsync --times` can."""
    other = path.parent / "backup"
    other.write_bytes(content)
    shutil.copystat(path, other)
    shutil.copy2(other, path)


WAYS = [overwrite, rename_over, copy_with_times]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["volume", "picture"])
def test_other_content_of_the_same_size_and_time_is_read(site, way, kind):
    if kind == "volume":
        site.nifti("a.nii", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
        site.nifti("b.nii", np.arange(64, dtype=np.int16)[::-1].reshape(4, 4, 4))
        stream, config = "brain-mr", STREAM
    else:
        for name, pixels in (("a", np.arange(64)), ("b", np.arange(64)[::-1])):
            Image.fromarray(pixels.astype(np.uint8).reshape(8, 8)).save(site.write() / f"{name}.bmp")
        stream, config = "chest-xray", StreamConfig(shape=(8, 8), patch=(4, 4))
    suffix = "nii" if kind == "volume" else "bmp"
    path, other = site.folder / f"a.{suffix}", site.folder / f"b.{suffix}"
    site.row("a", stream, path.name)
    before = np.array(open_store(site.folder, {stream: config}).images[stream])
    put_back(path, lambda: way(path, other.read_bytes()))
    after = np.array(open_store(site.folder, {stream: config}).images[stream])
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("way", WAYS)
def test_a_cohort_of_real_images_notices_too(tmp_path, way):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"before")
    listed, mark = listing_of(tmp_path, "*.nii"), file_fingerprint(path)
    put_back(path, lambda: way(path, b"after!"))
    assert listing_of(tmp_path, "*.nii") != listed
    assert file_fingerprint(path) != mark


def test_nothing_changed_and_nothing_is_read_anew(site):
    site.add("a")
    open_store(site.folder, {"brain-mr": STREAM})
    open_store(site.folder, {"brain-mr": STREAM}, progress=lambda *_: pytest.fail("built again"))
