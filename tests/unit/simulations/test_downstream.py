"""The study of few labels: its folders, its answers, and every arm on a few images."""

import dataclasses
import os

import nibabel
import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from panfm.data.tables import read_table
from simulations.cohorts.prepare import WEIGHTS
from simulations.cohorts.real_images import person_of
from simulations.harness import ArmJob, CohortJob, StudyOptions
from simulations.studies import _downstream_data as data
from simulations.studies import downstream_study as study
from tests.unit.models.test_public_weights import random_dinov2

needs_images = pytest.mark.skipif("PANFM_REAL_DATA" not in os.environ, reason="PANFM_REAL_DATA is not set")


def test_a_slice_is_upright_and_in_the_middle(tmp_path):
    """Anterior is right, superior is on top, whatever the file's own axes are."""
    voxels = np.zeros((5, 8, 6), np.uint8)
    voxels[2, 7, 5] = 9
    scan = nibabel.Nifti1Image(voxels[:, ::-1], np.diag([1.0, -1.0, 1.0, 1.0]))
    nibabel.save(scan, tmp_path / "scan.nii")
    cut = data.middle_slice(tmp_path / "scan.nii")
    assert cut.shape == (6, 8)
    assert np.argwhere(cut).tolist() == [[0, 7]]
    square = data.padded(cut)
    assert square.shape == (60, 60)
    assert np.argwhere(square).tolist() == [[27, 33]]


def rows_of(folder):
    return [cells for _, cells in read_table(folder / "manifest.csv", ("subject", "path"))[1]]


@needs_images
def test_people_and_classes_are_shared_out_by_the_seed(tmp_path):
    for name in ("hippocampus", "busi"):
        data.WRITERS[name](tmp_path / name, 3)
    people = [
        {person_of(row["subject"]) for row in rows_of(folder)} for folder in data.site_folders(tmp_path / "hippocampus")
    ]
    assert len(set().union(*people)) == sum(map(len, people))
    pictures = [[row["subject"] for row in rows_of(folder)] for folder in data.site_folders(tmp_path / "busi")]
    assert list(map(len, pictures)) == [90, 90, 60]
    assert len({one for place in pictures for one in place}) == 240
    labels = [
        cells["finding"]
        for _, cells in read_table(data.site_folders(tmp_path / "busi")[2] / "labels.csv", ("finding",))[1]
    ]
    assert sorted(map(labels.count, set(labels))) == [20, 20, 20]
    data.WRITERS["busi"](tmp_path / "again", 4)
    assert set(pictures[2]) != {row["subject"] for row in rows_of(data.site_folders(tmp_path / "again")[2])}


def test_answers_and_the_target(monkeypatch):
    def run_arms(options, jobs, length, write_draw, measure):
        gains = {"scratch": 0.0, "pretrained": 0.1, "scratch-vit-s": -0.2, "public": 0.3}
        for draw, seed in options.pairs():
            for job in jobs:
                name, _, arm = job.partition("/")
                metric = study.TASKS[name].metric
                level = 0.5 + gains[arm] * (seed if name == "busi" else -1.0)
                values = {f"{metric}_{name}_{labels}": level for labels in study.LABELS}
                if name == "busi":
                    values |= {f"-probe:{metric}": level for metric in tuple(values)}
                yield ArmJob(draw, seed, job, length, None), values

    monkeypatch.setattr(study, "run_arms", run_arms)
    result = study.run(StudyOptions(seeds=2, draws=None, first_seed=1), study.ARMS[:2], ["hippocampus", "busi"])
    assert result.ratios["auc_busi_5/pretrained-minus-scratch"] == pytest.approx(0.15)
    assert result.ratios["dice_hippocampus_5/pretrained-at-least-scratch"] == 0.0
    [target] = result.targets
    assert (target.value, target.is_met) == (1.0, True)
    assert ("auc_busi_all", "pretrained-probe") in result.values
    lost = study.run(StudyOptions(seeds=2, draws=None), study.ARMS[:2], ["hippocampus"])
    assert not lost.targets[0].is_met


def test_large_models_read_no_volumes():
    assert [study.is_possible("hippocampus", arm) for arm in study.ARMS] == [True, True, False, False]
    assert all(study.is_possible(name, arm) for name in ("slices", "busi") for arm in study.ARMS)


@needs_images
@pytest.mark.slow
def test_arms_on_a_few_pictures(tmp_path, monkeypatch):
    """Random public weights of two blocks; one step each."""
    safetensors.torch.save_file(random_dinov2(patch=14), tmp_path / "vit.safetensors")
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "vit.safetensors"))
    nano = {"size": "nano", "tokenizer": "patch", "positions": "learned", "layer-scale": True}
    monkeypatch.setattr(study, "LARGE", study.LARGE | {"model": nano, "features": {"pooling": "layers"}})
    monkeypatch.setattr(study, "LABELS", {"5": 5})
    monkeypatch.setattr(study, "WRITERS", {name: data.WRITERS[name] for name in ("slices", "busi")})
    few = {"steps": 1, "batch_size": 4}
    for name, task in tuple(study.TASKS.items()):
        short = task.pretraining.replace("rounds = ", "rounds = 1 # ").replace("local-steps = ", "local-steps = 1 # ")
        changed = {"pretraining": short, "tuning": task.tuning | few, "large_tuning": task.large_tuning | few}
        monkeypatch.setitem(study.TASKS, name, dataclasses.replace(task, **changed))
    cohort = study.write_draw(CohortJob(0, tmp_path / "cohort"))
    with Image.open(next((cohort / "slices" / "holdout").glob("*-mask.png"))) as mask:
        assert set(np.unique(mask)) == {0, 1, 2}
    jobs = [
        ("slices", "pretrained"),
        ("slices", "public"),
        ("busi", "scratch"),
        ("busi", "pretrained"),
        ("busi", "public"),
    ]
    measured = {job: study.measure(ArmJob(0, 0, "/".join(job), 0, cohort)) for job in jobs}
    assert measured["slices", "public"].keys() == {"dice_slices_5"}
    assert measured["busi", "public"].keys() == {"auc_busi_5", "-probe:auc_busi_5"}
    assert measured["busi", "pretrained"] != measured["busi", "scratch"]
    assert all(0.0 <= value <= 1.0 for values in measured.values() for value in values.values())
