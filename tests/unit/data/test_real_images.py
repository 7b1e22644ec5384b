"""Real scans of all seven organs, and pictures of six modalities, through check and cache.

The images lie outside the repository, at $PANFM_REAL_DATA.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from panfm.anatomy import DEFAULT_ORGANS, parse_stream
from panfm.config import StreamConfig
from panfm.data.cache import open_store
from panfm.data.check import check_site

REAL = os.environ.get("PANFM_REAL_DATA")
pytestmark = pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images")

VOLUME = StreamConfig(shape=(16, 16, 16), patch=(8, 8, 8), spacing_mm=(6.0, 6.0, 6.0))
PICTURE = StreamConfig(shape=(32, 32), patch=(8, 8))
BODY_PART = {
    "ct": "abdomen",
    "mr": "brain",
    "xray": "chest",
    "ultrasound": "breast",
    "pet": "body",
    "pathology": "blood",
}


def write_site(folder, rows):
    folder.mkdir()
    (folder / "site.toml").write_text('name = "real"\n')
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("subject", "stream", "path", "split", "mask"), *rows])
    return folder


def table(name):
    with (Path(REAL) / name / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_sound(folder, streams, num_rows):
    report = check_site(folder, streams, organs={parse_stream(stream)[0] for stream in streams})
    assert [str(fault) for fault in report.faults] == []
    assert len(report.rows) == num_rows
    store = open_store(folder, streams)
    assert sum(len(images) for images in store.images.values()) == num_rows
    for stream, images in store.images.items():
        assert images.min() >= 0, stream
        assert images.max() <= 1, stream
        shows_something = images.std(axis=tuple(range(1, images.ndim))) > 0.01
        assert shows_something.mean() > 0.95, stream  # one of the pictures is blank
    return store


def test_all_seven_organs(tmp_path):
    root = Path(REAL) / "organs3d"
    rows = [
        (
            line["subject"],
            f"{line['organ']}-{line['modality']}",
            root / line["file"],
            "",
            line["mask"] and root / line["mask"],
        )
        for line in table("organs3d")
        if line["organ"] in DEFAULT_ORGANS
    ]
    streams = dict.fromkeys((stream for _, stream, *_ in rows), VOLUME)
    store = assert_sound(write_site(tmp_path / "site", rows), streams, len(rows))
    assert {parse_stream(stream)[0] for stream in store.images} == set(DEFAULT_ORGANS)


def test_hippocampus_volumes_and_masks(tmp_path):
    root = Path(REAL) / "hippocampus"
    scans = sorted((root / "images").iterdir())[::4]
    rows = [(scan.name[:-7], "hippocampus-mr", scan, "", root / "labels" / scan.name) for scan in scans]
    assert_sound(write_site(tmp_path / "site", rows), {"hippocampus-mr": VOLUME}, len(scans))


def test_pictures_of_six_modalities(tmp_path):
    root = Path(REAL) / "modality2d"
    rows = [
        (line["file"], f"{BODY_PART[line['modality']]}-{line['modality']}", root / line["file"], line["split"], "")
        for line in table("modality2d")[::5]
    ]
    streams = dict.fromkeys((stream for _, stream, *_ in rows), PICTURE)
    assert len(streams) == 6
    assert_sound(write_site(tmp_path / "site", rows), streams, len(rows))


def test_whole_bodies(tmp_path):
    root = Path(REAL) / "organs3d/whole"
    rows = [
        (
            f"TS-{m}1",
            f"abdomen-{m}",
            root / f"TS-{m}1_{m.upper()}.nii.gz",
            "",
            root / f"TS-{m}1_{m.upper()}_labels.nii.gz",
        )
        for m in ("ct", "mr")
    ]
    store = assert_sound(write_site(tmp_path / "site", rows), {"abdomen-ct": VOLUME, "abdomen-mr": VOLUME}, 2)
    assert not np.array_equal(store.images["abdomen-ct"], store.images["abdomen-mr"])
