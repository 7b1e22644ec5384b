"""Sites of real pictures: shared out as described on small ones, and the real ones through check, cache and a step."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from panfm.config import StreamConfig
from panfm.data.cache import open_store
from panfm.data.check import check_site
from panfm.errors import ConfigError, DataError
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore, read_label_info
from panfm.training.trainer import Trainer
from simulations.cohorts.prepare import cohort_of, load_simulation
from simulations.cohorts.real_modalities import RealModalitiesCohort, class_labels

REAL = os.environ.get("PANFM_REAL_DATA")
EXPERIMENT = Path(__file__).resolve().parents[3] / "configs/experiments/real-modalities.toml"
STREAM = StreamConfig(shape=(8, 8), patch=(4, 4))
STREAMS = {"abdomen-ct": STREAM, "chest-xray": STREAM, "body-pet": STREAM, "skin-photo": STREAM}
CLASSES = {"ct": ("HeadCT", "Chest_CT"), "xray": ("Hand", "CXR", "Foot"), "pet": ("FDG",)}


def _config(**changes):
    sites = {"north": {"streams": ["abdomen-ct"]}, "south": {"streams": ["chest-xray"]}}
    values = {"kind": "real-modalities", "held-out": ["body-pet"], "sites": sites} | changes
    return RealModalitiesCohort.model_validate(values, by_alias=True)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Per class three training pictures and one for tests."""
    folder, random, lines = tmp_path / "real" / "modality2d", np.random.default_rng(0), []
    for modality, kinds in CLASSES.items():
        for kind in kinds:
            for number in range(4):
                split = "test" if number == 3 else "train"
                file = f"{split}/{modality}/{kind}_{number}.png"
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 255, (9, 7), dtype=np.uint8)).save(folder / file)
                lines.append((file, split, modality, kind, "ours"))
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "split", "modality", "class", "source"), *lines])
    monkeypatch.setenv("PANFM_REAL_DATA", str(folder.parent))
    return folder


def test_sites_have_their_modality_and_the_holdout_the_rest(source, tmp_path):
    seen = []
    _config().write(tmp_path / "cohort", STREAMS, lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    held = {}
    for place in ("sites/north", "sites/south", "holdout"):
        report = check_site(tmp_path / "cohort" / place, STREAMS, organs=("abdomen", "chest", "body"))
        assert report.faults == ()
        held[place] = dict(report.coverage)
    assert held == {
        "sites/north": {("abdomen-ct", "train"): 6},
        "sites/south": {("chest-xray", "train"): 9},
        "holdout": {
            ("body-pet", "train"): 3,
            ("body-pet", "test"): 1,
            ("abdomen-ct", "test"): 2,
            ("chest-xray", "test"): 3,
        },
    }
    assert not list((tmp_path / "cohort").rglob("*.png"))


def test_labels_are_classes_within_a_modality(source, tmp_path):
    _config().write(tmp_path / "cohort", STREAMS)
    assert read_label_info(tmp_path / "cohort") == dict.fromkeys(
        ("ct-chest-ct", "ct-headct", "xray-cxr", "xray-foot", "xray-hand"), LabelInfo("class")
    )
    place = LabelledStore.open(tmp_path / "cohort" / "holdout", STREAMS)
    row = {name: at for at, name in enumerate(place.store.subjects)}
    names = ["ct-headct", "ct-chest-ct", "xray-hand"]
    values = place.values(names, np.array([row["HeadCT_3"], row["Hand_3"], row["FDG_3"]]))
    unknown = np.nan
    np.testing.assert_array_equal(values, [[1, 0, unknown], [unknown, unknown, 1], [unknown] * 3])


def test_a_modality_of_one_class_has_no_label():
    pictures = [{"modality": "mr", "class": "a"}, {"modality": "ct", "class": "b"}, {"modality": "ct", "class": "c_d"}]
    assert class_labels(pictures) == {"ct-b": ("ct", "b"), "ct-c-d": ("ct", "c_d")}


@pytest.mark.parametrize(
    ("streams", "held_out"),
    [
        (STREAMS, "skin-photo"),
        (STREAMS | {"body-pet": StreamConfig(shape=(8,) * 3, patch=(4,) * 3, spacing_mm=(1.0,) * 3)}, "body-pet"),
    ],
)
def test_what_is_not_a_picture_we_have_is_refused(source, tmp_path, streams, held_out):
    with pytest.raises(ConfigError, match=f"stream {held_out}: expected pictures of one of ct, pet, xray"):
        _config(**{"held-out": [held_out]}).write(tmp_path / "cohort", streams)
    assert not (tmp_path / "cohort").exists()


def test_no_real_data_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("PANFM_REAL_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"\$PANFM_REAL_DATA is not set, expected .* modality2d"):
        _config().write(tmp_path / "cohort", STREAMS)


def test_an_existing_folder_or_a_broken_manifest_is_refused(source, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        _config().write(tmp_path, STREAMS)
    (source / "manifest.csv").write_text("file,split\n")
    with pytest.raises(DataError, match=r"modality2d/manifest.csv: no column modality, class"):
        _config().write(tmp_path / "cohort", STREAMS)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images")
def test_the_shipped_experiment_checks_caches_tokenises_and_learns(tmp_path):
    run = load_simulation(EXPERIMENT, ["train.batch-size=8"])
    cohort_of(run).write(tmp_path / "cohort", run.streams)
    for site, streams in {"ct-centre": {"abdomen-ct"}, "breast-clinic": {"breast-mr", "breast-ultrasound"}}.items():
        folder = tmp_path / "cohort" / "sites" / site
        faults = check_site(folder, run.streams, organs=run.organs).faults
        assert {Path(fault.file).name for fault in faults} <= {"CT_0190.jpg"}  # which is blank
        store = open_store(folder, run.streams)
        assert set(store.images) == streams
        trainer = Trainer(run, sorted(streams))
        before = trainer.shared_state()
        told = trainer.train(store, store.indices("train"), first_step=0, num_steps=1, site=site, round_number=1)
        assert (told.num_steps, told.num_skipped) == (1, 0)
        after = trainer.shared_state()
        assert all(torch.isfinite(value).all() for value in after.values())
        for stream in streams:
            moved = [not torch.equal(before[name], after[name]) for name in before if f"streams.{stream}." in name]
            assert any(moved), stream
    holdout = open_store(tmp_path / "cohort" / "holdout", run.streams)
    assert holdout.num_holding("blood-pathology", "train") == 150
    assert {name: holdout.num_holding(name, "test") for name in ("blood-pathology", "body-pet")} == {
        "blood-pathology": 50,
        "body-pet": 137,
    }
