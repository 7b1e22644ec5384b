import csv
import os

import nibabel as nib
import numpy as np
import pytest

from panfm.config import StreamConfig, load_site
from panfm.data.check import check_site
from panfm.errors import ConfigError, DataError
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore, read_label_info
from simulations.cohorts.real_images import (
    BODY,
    CLINICS,
    LABELS,
    RealImagesCohort,
    measure_mask,
    person_of,
    share_out,
)

REAL = os.environ.get("PANFM_REAL_DATA")
STREAM = StreamConfig(shape=(8, 8, 8), patch=(4, 4, 4), spacing_mm=(2.0, 2.0, 2.0))
STREAMS = {"hippocampus-mr": STREAM, "liver-ct": STREAM, "liver-mr": STREAM, "heart-ct": STREAM}
CONFIG = RealImagesCohort(kind="real-images", seed=3)


def save(path, voxels, spacing=(1.0, 1.0, 2.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([*spacing, 1.0])), path)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Twelve hippocampus volumes of eight people, and three scans of other organs."""
    folder, generator = tmp_path / "real", np.random.default_rng(0)
    for number in (1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 14, 15):
        mask = np.zeros((6, 7, 8), np.uint8)
        mask[0, 0, :number] = 1
        mask[1, :2, :3] = 2
        save(folder / "hippocampus" / "labels" / f"hippocampus_{number:03}.nii.gz", mask[:, :, :8])
        voxels = generator.random((6, 7, 8)).astype(np.float32)
        save(folder / "hippocampus" / "images" / f"hippocampus_{number:03}.nii.gz", voxels)
    for name in ("liver/A-1_CT", "liver/A-1_CT_mask", "liver/B_MR", "heart/A-1_CT", "spleen/A-1_CT"):
        voxels = generator.integers(1, 300, size=(5, 5, 5)).astype(np.int16)
        save(folder / "organs3d" / f"{name}.nii.gz", voxels)
    monkeypatch.setenv("PANFM_REAL_DATA", str(folder))
    return folder


def rows_of(folder):
    with (folder / "manifest.csv").open() as file:
        return list(csv.DictReader(file))


def test_cohort_is_made_of_sound_sites_that_point_to_the_scans(source, tmp_path):
    seen = []
    CONFIG.write(tmp_path / "cohort", STREAMS, lambda *step: seen.append(step))
    places = [tmp_path / "cohort" / "sites" / name for name in (*CLINICS, BODY)] + [tmp_path / "cohort" / "holdout"]
    for place in places:
        assert check_site(place, STREAMS, organs=("hippocampus", "liver", "heart")).faults == ()
    assert seen[-1] == (12, 12)
    assert not list((tmp_path / "cohort").rglob("*.nii.gz"))
    assert {row["split"] for row in rows_of(places[-1])} == {"test"}
    body = {(row["subject"], row["stream"], bool(row["mask"])) for row in rows_of(places[2])}
    assert body == {("A-1", "liver-ct", True), ("B", "liver-mr", False), ("A-1", "heart-ct", False)}
    assert load_site(places[2]).labels is None
    assert read_label_info(tmp_path / "cohort")["anterior-volume"] == LabelInfo("volume", False, ("hippocampus",))


def test_every_volume_goes_to_one_place_and_no_person_is_torn_apart(source):
    volumes = sorted((source / "hippocampus" / "images").glob("*"))
    places = share_out(volumes, CONFIG)
    assert sorted(volume for held in places.values() for volume in held) == volumes
    people = [{person_of(volume.name) for volume in held} for held in places.values()]
    assert sum(map(len, people)) == len(set.union(*people)) == 8
    assert places == share_out(volumes, CONFIG)
    assert any(share_out(volumes, CONFIG.model_copy(update={"seed": seed})) != places for seed in (4, 5, 6))


def test_limit_keeps_whole_people(source):
    volumes = sorted((source / "hippocampus" / "images").glob("*"))
    for limit in (5, 6, 7):
        places = share_out(volumes, CONFIG.model_copy(update={"limit": limit}))
        kept = [volume for held in places.values() for volume in held]
        assert limit - 2 < len(kept) <= limit
        people = {person_of(volume.name) for volume in kept}
        assert len(kept) == sum(person_of(volume.name) in people for volume in volumes)


def test_too_few_people_are_refused(source):
    volumes = sorted((source / "hippocampus" / "images").glob("*"))
    with pytest.raises(DataError, match="2 people cannot be shared out over 3 places"):
        share_out(volumes[:3], CONFIG)


def test_labels_are_volumes_in_mm3(source, tmp_path):
    assert measure_mask(source / "hippocampus" / "labels" / "hippocampus_003.nii.gz") == (3 * 2.0, 6 * 2.0)
    CONFIG.write(tmp_path / "cohort", STREAMS)
    place = LabelledStore.open(tmp_path / "cohort" / "holdout", STREAMS)
    first = int(place.store.subjects[0][-3:])
    assert place.values(list(LABELS), np.array([0])).tolist() == [[min(first, 8) * 2.0, 12.0]]


def test_left_and_right_share_a_person():
    assert [person_of(f"hippocampus_{number:03}.nii.gz") for number in (1, 2, 3, 97, 98, 99)] == [1, 1, 2, 49, 49, 50]
    with pytest.raises(DataError, match="expected a name like"):
        person_of("brain.nii.gz")


@pytest.mark.parametrize("value", [None, "", "nowhere"])
def test_no_real_data_is_one_line(value, tmp_path, monkeypatch):
    monkeypatch.delenv("PANFM_REAL_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("PANFM_REAL_DATA", value)
    with pytest.raises(ConfigError, match=r"\$PANFM_REAL_DATA") as caught:
        CONFIG.write(tmp_path / "cohort", STREAMS)
    assert "\n" not in str(caught.value)


def test_an_existing_folder_is_left_alone(source, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        CONFIG.write(tmp_path, STREAMS)


@pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images")
def test_the_two_sides_of_a_person_are_alike():
    """Backs the rule that tells persons apart: volumes 2k-1, 2k are alike, volumes 2k, 2k+1 are not."""
    from pathlib import Path

    masks = sorted((Path(REAL) / "hippocampus" / "labels").glob("*.nii.gz"))
    size = {int(path.name[12:15]): measure_mask(path)[0] for path in masks}

    def correlation(first):
        pairs = [
            (size[number], size[number + 1]) for number in range(first, 394, 2) if {number, number + 1} <= set(size)
        ]
        return np.corrcoef(np.array(pairs).T)[0, 1]

    assert correlation(1) > 0.7
    assert abs(correlation(2)) < 0.4
