"""The phantom on disk: whole, the same bytes every time, and equal to the phantom in memory."""

import csv
import hashlib
import tomllib

import nibabel as nib
import numpy as np
import pytest

from panfm.anatomy import DEFAULT_ORGANS
from panfm.config import StreamConfig, load_site
from panfm.data.read import read_image
from panfm.errors import DataError
from simulations.cohorts.phantom import PhantomCohort
from simulations.cohorts.phantom_body import ORGANS
from simulations.cohorts.phantom_draw import Phantom
from simulations.cohorts.phantom_labels import LABELS
from simulations.studies._phantoms import phantom_store

STREAMS = {
    f"{organ}-mr": StreamConfig(shape=(16, 16, 16), patch=(8, 8, 16), spacing_mm=(spec.view_mm / 16,) * 3)
    for organ, spec in ORGANS.items()
}


def _config(**changes):
    sites = {
        "neuro": {"organs": ["brain", "heart"], "subjects": 6},
        "all": {"organs": list(DEFAULT_ORGANS), "subjects": 11, "age-shift": 0.5},
    }
    values = {"kind": "phantom", "preset": "transient", "seed": 7, "holdout-subjects": 3, "sites": sites} | changes
    return PhantomCohort.model_validate(values, by_alias=True)


def _digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohorts") / "one"
    calls = []
    _config().write(folder, STREAMS, lambda done, total: calls.append((done, total)))
    return folder, calls


def test_same_description_same_bytes(cohort, tmp_path):
    _config().write(tmp_path / "again", STREAMS)
    assert _digest(tmp_path / "again") == _digest(cohort[0])


@pytest.mark.parametrize("changes", [{"seed": 8}, {"preset": "lasting"}, {"preset": "textured"}])
def test_another_seed_or_preset_changes_the_images(cohort, tmp_path, changes):
    _config(**changes).write(tmp_path / "other", STREAMS)
    image = "holdout/images/holdout-00000_brain-mr.nii.gz"
    assert (tmp_path / "other" / image).read_bytes() != (cohort[0] / image).read_bytes()


def test_manifests_name_the_files_that_are_there(cohort):
    folder, calls = cohort
    images = 0
    for place in (folder / "sites/neuro", folder / "sites/all", folder / "holdout"):
        rows = _table(place / "manifest.csv")
        assert {path.name for path in (place / "images").iterdir()} == {row["path"].split("/")[1] for row in rows}
        assert load_site(place).name == place.name
        images += len(rows)
    assert calls[-1] == (images, images)
    assert [done for done, _ in calls] == list(range(1, images + 1))
    assert {row["stream"] for row in _table(folder / "sites/neuro/manifest.csv")} == {"brain-mr", "heart-mr"}


def test_held_out_patients_are_complete_and_only_for_tests(cohort):
    rows = _table(cohort[0] / "holdout/manifest.csv")
    assert len(rows) == 3 * len(STREAMS)
    assert {row["split"] for row in rows} == {"test"}
    splits = {row["subject"]: row["split"] for row in _table(cohort[0] / "sites/all/manifest.csv")}
    assert list(splits.values()).count("val") == 1


def test_cohort_toml_says_what_it_is(cohort):
    table = tomllib.loads((cohort[0] / "cohort.toml").read_text(encoding="utf-8"))
    assert (table["preset"], table["seed"]) == ("transient", 7)
    assert table["subjects"] == {"sites/neuro": 6, "sites/all": 11, "holdout": 3}
    assert table["labels"]["dementia"] == {"kind": "disease", "weak": True, "organs": ["brain"]}
    assert set(table["labels"]) == set(LABELS) == set(_table(cohort[0] / "holdout/labels.csv")[0]) - {"subject"}


def test_headers_are_millimetres_in_the_scanner_orientation(cohort):
    image = nib.load(cohort[0] / "holdout/images/holdout-00001_kidney-mr.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
    assert "".join(nib.orientations.aff2axcodes(image.affine)) == ORGANS["kidney"].axcodes


@pytest.mark.parametrize("place", ["all", "holdout"])
def test_memory_equals_files(cohort, place):
    phantom = Phantom("transient", 7)
    if place == "all":
        subjects, folder = phantom.draw("all", 11, DEFAULT_ORGANS, age_shift=0.5), cohort[0] / "sites/all"
    else:
        subjects, folder = phantom.draw("holdout", 3, DEFAULT_ORGANS, complete=True), cohort[0] / "holdout"
    store = phantom_store(phantom, subjects, STREAMS)
    rows = _table(folder / "manifest.csv")
    for row in rows:
        position = np.flatnonzero(store.rows[row["stream"]] == subjects.names.index(row["subject"]))
        expected = read_image(folder / row["path"], row["stream"], STREAMS[row["stream"]])
        np.testing.assert_array_equal(store.images[row["stream"]][position[0]], expected)
    assert sum(map(len, store.rows.values())) == len(rows)


def test_no_byte_of_an_image_tells_the_version_of_python(cohort):
    for path in (cohort[0] / "holdout/images").iterdir():
        assert path.read_bytes()[:10] == bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 4, 255])  # no time, no system


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(DataError, match="exists already"):
        _config().write(tmp_path / "kept", STREAMS)


def test_a_stream_that_the_phantom_cannot_draw_is_refused(tmp_path):
    picture = {"chest-xray": StreamConfig(shape=(16, 16), patch=(8, 8))}
    with pytest.raises(DataError, match="chest-xray: the phantom has MR volumes only"):
        _config().write(tmp_path / "new", picture)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_off_cohort_leaves_no_folder(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _config().write(tmp_path / "half", STREAMS, stop)
    assert not (tmp_path / "half").exists()
    _config().write(tmp_path / "half", STREAMS)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
