import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from panfm.config import StreamConfig
from panfm.data import cache_file
from panfm.data.cache import open_store
from panfm.data.manifest import Fault, Row
from panfm.data.quarantine import write_quarantine
from panfm.data.read import read_image
from panfm.errors import DataError


@pytest.fixture
def clinic(site):
    """Four subjects: c and a hold both streams, b brain only, d heart only (and first in the manifest)."""
    site.add("d", "heart-mr", split="val")
    for subject in "cab":
        site.add(subject)
    for subject in "ac":
        site.add(subject, "heart-mr")
    return site


def files_of(clinic):
    return sorted(path.name for path in (clinic.folder / ".panfm/cache").iterdir())


def times_of(clinic):
    return {path: path.stat().st_mtime_ns for path in (clinic.folder / ".panfm/cache").iterdir()}


def test_images_are_those_of_read_image_in_manifest_order(clinic, streams):
    store = open_store(clinic.folder, streams)
    assert store.subjects == ("d", "c", "a", "b")
    assert store.splits == ("val", "train", "train", "train")
    assert store.rows["brain-mr"].tolist() == [1, 2, 3]
    assert store.rows["heart-mr"].tolist() == [0, 1, 2]
    for stream, rows in store.rows.items():
        for image, row in zip(store.images[stream], rows, strict=True):
            path = clinic.folder / f"{store.subjects[row]}_{stream}.nii.gz"
            np.testing.assert_array_equal(image, read_image(path, stream, streams[stream]))


def test_images_are_memory_mapped_and_read_only(clinic, streams):
    images = open_store(clinic.folder, streams).images["brain-mr"]
    assert isinstance(images.stored, np.memmap)
    assert images.stored.dtype == np.uint16
    assert images[0].dtype == np.float32
    assert not images.stored.flags.writeable


def test_second_opening_reads_no_image(clinic, streams, monkeypatch):
    steps = []
    open_store(clinic.folder, streams, progress=lambda *step: steps.append(step))
    assert steps == [(stream, done, 3) for stream in ("brain-mr", "heart-mr") for done in (1, 2, 3)]
    before = times_of(clinic)
    open_store(clinic.folder, streams, progress=lambda *step: pytest.fail("built again"))
    assert times_of(clinic) == before


def test_a_run_reads_only_its_streams(clinic, streams):
    clinic.row("c", "toe-mr", "absent.nii.gz")
    store = open_store(clinic.folder, {"heart-mr": streams["heart-mr"]})
    assert store.subjects == ("d", "c", "a")
    assert list(store.images) == ["heart-mr"]
    with pytest.raises(DataError, match="no image of the run's streams, expected one of liver-mr"):
        open_store(clinic.folder, {"liver-mr": streams["heart-mr"]})


def test_a_stream_that_nobody_holds_is_absent(clinic, streams):
    store = open_store(clinic.folder, streams | {"liver-mr": streams["brain-mr"]})
    assert list(store.images) == ["brain-mr", "heart-mr"]


@pytest.mark.parametrize("change", ["content", "time", "row gone"])
def test_changed_data_are_read_anew_and_the_stale_file_goes(clinic, streams, change):
    open_store(clinic.folder, streams)
    brain, heart = files_of(clinic)
    path = clinic.folder / "a_brain-mr.nii.gz"
    if change == "content":
        clinic.nifti(path.name, np.arange(27, dtype=np.int16).reshape(3, 3, 3))
    elif change == "time":
        os.utime(path, ns=(1, 1))
    else:
        clinic.lines = [line for line in clinic.lines if not line.startswith("a,brain")]
        clinic.write()
    store = open_store(clinic.folder, streams)
    assert len(files_of(clinic)) == 2
    assert heart in files_of(clinic)
    assert brain not in files_of(clinic)
    if change == "content":
        expected = read_image(path, "brain-mr", streams["brain-mr"])
        np.testing.assert_array_equal(store.images["brain-mr"][1], expected)


def test_other_settings_live_side_by_side(clinic, streams):
    open_store(clinic.folder, streams)
    before = times_of(clinic)
    finer = streams["brain-mr"].model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)})
    open_store(clinic.folder, streams | {"brain-mr": finer})
    after = times_of(clinic)
    assert len(after) == 3
    assert before.items() <= after.items()


def test_new_preprocessing_version_reads_anew(clinic, streams, monkeypatch):
    open_store(clinic.folder, streams)
    before = set(files_of(clinic))
    monkeypatch.setattr(cache_file, "PREPROCESSING_VERSION", cache_file.PREPROCESSING_VERSION + 1)
    open_store(clinic.folder, streams)
    assert len(set(files_of(clinic)) - before) == 2


def test_faulty_image_is_refused_and_leaves_nothing_behind(clinic, streams):
    (clinic.folder / "a_brain-mr.nii.gz").write_text("text")
    with pytest.raises(DataError, match=r"a_brain-mr.nii.gz: found no NIfTI header"):
        open_store(clinic.folder, streams)
    assert files_of(clinic) == []
    (clinic.folder / "a_brain-mr.nii.gz").unlink()
    with pytest.raises(DataError, match=r"a_brain-mr.nii.gz: found no such file"):
        open_store(clinic.folder, streams)


def test_quarantined_row_is_left_out(clinic, streams):
    (clinic.folder / "b_brain-mr.nii.gz").write_text("text")
    write_quarantine(clinic.folder, [Fault("", "", "", Row(5, "b", "brain-mr", "b_brain-mr.nii.gz"))])
    store = open_store(clinic.folder, streams)
    assert store.subjects == ("d", "c", "a")


def test_interrupted_build_leaves_nothing_that_is_read(clinic, streams):
    def stop(stream, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(clinic.folder, streams, progress=stop)
    assert files_of(clinic) == []
    assert len(open_store(clinic.folder, streams).images["brain-mr"]) == 3


def test_full_disk_is_one_line(clinic, streams, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cache: cannot hold the cache \(No space left on device\)"):
        open_store(clinic.folder, streams)
    assert files_of(clinic) == []


def test_cache_folder_that_is_a_file(clinic, streams):
    (clinic.folder / ".panfm").write_text("")
    with pytest.raises(DataError, match="cannot hold the cache"):
        open_store(clinic.folder, streams)


def test_several_may_build_at_once(clinic, streams):
    """Threads stand for processes: each writes a file of its own and renames it."""
    together = threading.Barrier(3, timeout=60)

    def build(_):
        return open_store(clinic.folder, streams, progress=lambda stream, done, total: done < 3 or together.wait())

    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(build, range(3)))
    assert len(files_of(clinic)) == 2
    for store in stores:
        for stream, images in store.images.items():
            np.testing.assert_array_equal(images, open_store(clinic.folder, streams).images[stream])


def test_sessions_of_a_subject_stand_together_in_their_order(site, streams):
    site.header = "subject,stream,path,session"
    for number, (subject, session) in enumerate([("b", "2"), ("a", ""), ("b", "1")]):
        site.nifti(f"{number}.nii.gz", np.full((8, 8, 8), number, np.int16) + np.arange(8, dtype=np.int16))
        site.lines.append(f"{subject},brain-mr,{number}.nii.gz,{session}")
    store = open_store(site.write(), streams)
    assert store.subjects == ("b", "a")
    assert store.rows["brain-mr"].tolist() == [0, 0, 1]
    assert store.sessions == {"brain-mr": ["1", "2", ""]}
    for image, number in zip(store.images["brain-mr"], (2, 0, 1), strict=True):
        expected = read_image(site.folder / f"{number}.nii.gz", "brain-mr", streams["brain-mr"])
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("damage", ["empty", "short", "head"])
def test_a_damaged_file_is_written_anew(tmp_path, write_site, damage):
    folder = write_site(tmp_path / "alpha", "alpha", ("brain",))
    streams = {"brain-mr": StreamConfig(spacing_mm=(8.0, 8.0, 8.0), shape=(8, 8, 8), patch=(4, 4, 4))}
    before = np.array(open_store(folder, streams).images["brain-mr"])
    [path] = (folder / ".panfm" / "cache").glob("*.npy")
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "short": content[:-5], "head": b"x" + content[1:]}[damage])
    assert np.array_equal(open_store(folder, streams).images["brain-mr"], before)
