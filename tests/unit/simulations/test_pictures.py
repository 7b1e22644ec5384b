"""The modalities cohort: shapes that share a meaning, looks that share nothing, files that can be trusted."""

import csv
import hashlib
import tomllib

import numpy as np
import pytest
from PIL import Image

from panfm.anatomy import Modality
from panfm.config import StreamConfig
from panfm.data.cache import open_store
from panfm.data.check import check_site
from panfm.data.labels import read_label_table
from panfm.data.read import prepare_picture
from panfm.data.readers.picture import decode_picture
from panfm.errors import DataError
from simulations.cohorts.picture_cohort import Patient, PictureCohort, draw_places, patient_labels
from simulations.cohorts.picture_looks import LOOKS, blur, render
from simulations.cohorts.picture_shapes import SHAPES, SIZE, draw_mask

COLOUR = {Modality.FUNDUS, Modality.PATHOLOGY, Modality.ENDOSCOPY, Modality.PHOTO}
STREAMS = {
    f"part-{modality}": StreamConfig(shape=(16, 16), patch=(8, 8), channels=3 if modality in COLOUR else 1)
    for modality in Modality
}


def _config(**changes):
    sites = {
        "radiology": {"streams": ["part-xray", "part-ct"], "subjects": 41},
        "eyes": {"streams": ["part-fundus"], "subjects": 5},
    }
    values = {"kind": "modalities", "seed": 7, "holdout-subjects": 2, "held-out": ["part-photo"], "sites": sites}
    return PictureCohort.model_validate(values | changes, by_alias=True)


def _digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _rows(folder):
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
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
    _config(seed=8).write(tmp_path / "other", STREAMS)
    image = "holdout/images/holdout-00000_part-photo.png"
    assert (tmp_path / "other" / image).read_bytes() != (cohort[0] / image).read_bytes()


def test_every_place_is_sound_and_every_patient_has_one_picture(cohort):
    folder, calls = cohort
    places = {"sites/radiology": 41, "sites/eyes": 5, "holdout": 2 + 4 * 2}
    for place, number in places.items():
        report = check_site(folder / place, STREAMS, organs=("part",))
        assert report.faults == ()
        assert len({row.subject for row in report.rows}) == len(report.rows) == number
    assert calls == [(done, sum(places.values())) for done in range(1, sum(places.values()) + 1)]
    table = tomllib.loads((folder / "cohort.toml").read_text(encoding="utf-8"))
    assert table["subjects"] == places
    assert set(table["labels"]) == {f"shape-{shape}" for shape in SHAPES}


def test_no_site_has_the_held_out_stream_and_the_holdout_can_be_fitted(cohort):
    assert {row["stream"] for row in _rows(cohort[0] / "sites/radiology")} == {"part-xray", "part-ct"}
    holdout = [(row["stream"], row["split"]) for row in _rows(cohort[0] / "holdout")]
    assert {pair: holdout.count(pair) for pair in holdout} == {
        ("part-photo", "train"): 2,
        ("part-photo", "test"): 2,
        ("part-xray", "test"): 2,
        ("part-ct", "test"): 2,
        ("part-fundus", "test"): 2,
    }


def test_every_tenth_patient_of_each_stream_is_for_validation(cohort):
    rows = _rows(cohort[0] / "sites/radiology")
    for stream, number in (("part-xray", 21), ("part-ct", 20)):
        splits = [row["split"] for row in rows if row["stream"] == stream]
        assert [at for at, split in enumerate(splits) if split == "val"] == [9, 19]
        assert len(splits) == number


def test_labels_say_one_shape_per_patient(cohort):
    table = read_label_table(cohort[0] / "sites/radiology/labels.csv")
    patients = draw_places(_config())["sites/radiology"]
    assert table.subjects == tuple(patient.name for patient in patients)
    assert (table.values.sum(axis=1) == 1).all()
    assert [table.names[at] for at in table.values.argmax(axis=1)] == [f"shape-{each.shape}" for each in patients]
    np.testing.assert_array_equal(table.values, patient_labels(patients))


@pytest.mark.parametrize("place", ["sites/radiology", "sites/eyes", "holdout"])
def test_files_hold_the_patients_pictures(cohort, place):
    store, patients = open_store(cohort[0] / place, STREAMS), draw_places(_config())[place]
    assert store.subjects == tuple(patient.name for patient in patients)
    assert store.splits == tuple(patient.split for patient in patients)
    assert set(store.images) == {patient.stream for patient in patients}
    for stream, images in store.images.items():
        holders = [index for index, patient in enumerate(patients) if patient.stream == stream]
        np.testing.assert_array_equal(store.rows[stream], holders)
        for image, index in zip(images, holders, strict=True):
            expected = prepare_picture(Image.fromarray(patients[index].picture()), STREAMS[stream])
            np.testing.assert_array_equal(image, expected)


def test_colour_where_it_is_right(cohort):
    pictures = (cohort[0] / "holdout/images").iterdir()
    modes = {path.stem.rpartition("-")[2]: decode_picture(path.read_bytes()).mode for path in pictures}
    assert modes == {"photo": "RGB", "fundus": "RGB", "xray": "L", "ct": "L"}


def test_a_volume_is_refused(tmp_path):
    volume = STREAMS | {"part-ct": StreamConfig(shape=(8, 8, 8), patch=(4, 4, 4), spacing_mm=(1.0, 1.0, 1.0))}
    with pytest.raises(DataError, match="stream part-ct: the modalities cohort has pictures only"):
        _config().write(tmp_path / "new", volume)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(DataError, match="exists already"):
        _config().write(tmp_path, STREAMS)


def _masks(shape):
    return np.stack([draw_mask(shape, np.random.default_rng(seed)) for seed in range(200)])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_inside_and_its_area_tells_nothing(shape):
    masks = _masks(shape)
    assert masks.min() >= 0
    assert masks.max() <= 1
    border = np.concatenate([masks[:, [0, -1]].ravel(), masks[:, :, [0, -1]].ravel()])
    assert border.mean() < 0.01
    assert masks.mean() == pytest.approx(_masks("disc").mean(), rel=0.02)


def test_shapes_of_one_pose_differ():
    masks = [draw_mask(shape, np.random.default_rng(3)) for shape in SHAPES]
    for at, one in enumerate(masks):
        for other in masks[:at]:
            overlap = np.minimum(one, other).sum() / np.maximum(one, other).sum()
            assert overlap < 0.85


def _outlined(modality, number=150):
    """Correlation over pixels and pictures between the shape and the picture's grey level, each less its mean map."""
    masks = np.stack([draw_mask("cross", np.random.default_rng([1, seed])) for seed in range(number)])
    pictures = [render(modality, mask, np.random.default_rng([2, at])) for at, mask in enumerate(masks)]
    grey = np.stack([each.reshape(SIZE, SIZE, -1).mean(axis=2) for each in pictures])
    masks, grey = masks - masks.mean(axis=0), grey - grey.mean(axis=0)
    return float((masks * grey).mean() / (masks.std() * grey.std()))


@pytest.mark.parametrize("modality", [each for each in Modality if each is not Modality.CT])
def test_every_modality_shows_the_shape(modality):
    assert abs(_outlined(modality, 40)) > 0.15


def test_ct_shows_the_shape_brighter_or_darker():
    mask = draw_mask("disc", np.random.default_rng(0))
    inside, around = mask > 0.9, (mask < 0.1) & (blur(mask, 3.0) > 0.1)
    pictures = [render(Modality.CT, mask, np.random.default_rng(seed)) / 255 for seed in range(20)]
    contrasts = np.array([picture[inside].mean() - picture[around].mean() for picture in pictures])
    assert (np.abs(contrasts) > 0.05).all()
    assert {-1, 1} == set(np.sign(contrasts))


def test_modalities_have_statistics_of_their_own():
    """A nearest-mean reader of six plain numbers tells ten modalities apart."""

    def numbers(modality, seed):
        picture = Patient(f"p{seed}", f"part-{modality}", "train", 0).picture() / 255.0
        grey = picture.reshape(SIZE, SIZE, -1).mean(axis=2)
        fine = np.abs(np.diff(grey, axis=1)).mean()
        chroma = np.ptp(picture.reshape(SIZE, SIZE, -1), axis=2).mean()
        return [grey.mean(), grey.std(), np.median(grey), fine, blur(grey, 3.0).std(), chroma]

    fit = np.array([[numbers(modality, seed) for seed in range(8)] for modality in LOOKS])
    test = np.array([[numbers(modality, seed) for seed in range(8, 14)] for modality in LOOKS])
    scale = fit.std(axis=(0, 1))
    distance = np.linalg.norm((test[:, :, None] - fit.mean(axis=1)) / scale, axis=-1)
    assert (distance.argmin(axis=-1) == np.arange(10)[:, None]).mean() > 0.8


def test_blur_by_hand():
    dot = np.zeros((SIZE, SIZE))
    dot[32, 32] = 1.0
    spread = blur(dot, 2.0)
    axis = np.arange(SIZE) - 32
    kernel = np.exp(-(axis**2) / 8.0)
    np.testing.assert_allclose(spread, np.outer(kernel, kernel) / kernel.sum() ** 2, atol=1e-6)


def test_patients_keep_their_picture_whoever_stands_beside_them():
    before, after = (draw_places(_config(**{"holdout-subjects": held}))["sites/eyes"][3] for held in (2, 3))
    np.testing.assert_array_equal(before.picture(), after.picture())
