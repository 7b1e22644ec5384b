"""Simulations write a map of embeddings, example slices and the routing of experts into report.json."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from panfm.evaluate.probe_labels import LabelInfo, LabelledStore
from panfm.models import build_model
from panfm.report.report_data import ReportData, read_report_data, write_report_data
from server.run_folder import RunFolder
from simulations.cohorts.opened import OpenedCohort
from simulations.embedding_map import HELD_OUT, embedding_map
from simulations.example_slices import _hidden, _in_slice, _middle, _slice_patches, example_slices, png_files
from simulations.expert_map import expert_map
from tests.cases import quick


def cohort(run, make_store, subjects=12):
    def place(name, split, seed):
        store = replace(make_store(run, subjects, seed=seed), splits=(split,) * subjects)
        known = np.arange(subjects, dtype=float) % 2
        known[0] = np.nan
        return LabelledStore(store, {"sick": known, "age": np.arange(subjects) + 0.5}, name)

    sites = {name: place(name, "train", seed) for seed, name in enumerate(("a", "b"))}
    labels = {"sick": LabelInfo("disease"), "age": LabelInfo("volume")}
    return OpenedCohort(sites, place("holdout", "test", 9), labels)


def test_the_map_has_sites_organs_and_answers_of_every_subject(make_run, make_store):
    run = make_run()
    opened, model = cohort(run, make_store), build_model(run)
    points = embedding_map(run, model, opened, ["age", "sick"])
    assert points.sites == ["a"] * 12 + ["b"] * 12 + [HELD_OUT] * 12
    assert {len(points.pca), len(points.tsne), len(points.organs), len(points.labels["sick"])} == {36}
    assert list(points.labels) == ["sick"]  # a number has no colours
    assert points.labels["sick"][:3] == [None, 1, 0]
    holds = [stream.split("-")[0] for stream in run.streams if 5 in opened.sites["a"].store.rows[stream]]
    assert points.organs[5] == ", ".join(holds)
    assert 1 >= points.explained[0] >= points.explained[1] >= 0
    again = embedding_map(run, model, opened, ["age", "sick"])
    assert (again.pca, again.tsne) == (points.pca, points.tsne)


def test_there_is_no_map_of_few_subjects_or_equal_embeddings(make_run, make_store):
    run = make_run()
    assert embedding_map(run, build_model(run), cohort(run, make_store, subjects=2), []) is None
    same = cohort(run, make_store)
    model = build_model(run)
    model.embed = lambda batch: torch.ones(batch.size, 4)
    assert embedding_map(run, model, same, []) is None


@pytest.mark.parametrize("objective", quick(["latent", "views", "mae"], 2))
def test_slices_of_every_stream(make_run, make_store, tmp_path, objective):
    """Pictures have the size of the slice; an objective that predicts nothing has no third one."""
    augment = "[augment]\n" if objective == "views" else ""
    run = make_run(f'[objective]\nname = "{objective}"\n[model]\nsize = "nano"\n{augment}')
    examples = example_slices(run, build_model(run), cohort(run, make_store))
    predicts = objective != "views"
    assert [row.stream for row in examples.rows] == list(run.streams)
    sizes = {"brain-mr": (8, 8), "heart-ct": (8, 4), "eye-fundus": (8, 8)}
    for row in examples.rows:
        original, masked = (np.asarray(picture(png)) for png in (row.input, row.masked))
        assert picture(row.input).size == sizes[row.stream]
        assert (row.prediction is not None) == predicts
        is_hidden = (masked == (64, 112, 168)).all(axis=2)
        assert 0 < is_hidden.sum() <= is_hidden.size
        assert np.array_equal(original[~is_hidden], masked[~is_hidden])
        if predicts:
            assert np.array_equal(original[~is_hidden], np.asarray(picture(row.prediction))[~is_hidden])
    assert 20 <= examples.fitted <= 24 if predicts else examples.fitted == 0  # some show nothing hidden in the slice
    assert set(examples.error) == (set(run.streams) if predicts else set())
    kinds = ("input", "masked", "prediction")[: 3 if predicts else 2]
    assert set(png_files(examples)) == {f"slices/{stream}/{kind}" for stream in run.streams for kind in kinds}
    write_report_data(tmp_path, ReportData(examples=examples))
    assert read_report_data(tmp_path).examples.rows[0].masked == examples.rows[0].masked


def test_a_batch_in_which_nothing_is_hidden(make_run, make_store):
    """Subjects of one token have nothing to hide; they come before others, in a batch of their own."""
    run = make_run('[model]\nsize = "nano"\n')
    one = run.streams["eye-fundus"].model_copy(update={"shape": (4, 4)})
    run = run.model_copy(update={"streams": run.streams | {"eye-fundus": one}})
    whole = make_store(run, 32, complete=True)
    late = {name: rows[16:] if name != "eye-fundus" else rows for name, rows in whole.rows.items()}
    images = {name: whole.images[name][-len(rows) :] for name, rows in late.items()}
    hidden = _hidden(run, build_model(run), replace(whole, images=images, rows=late), np.arange(32), "test")
    assert hidden["brain-mr"].subject.min() >= 16
    assert hidden["brain-mr"].features.shape == (len(hidden["brain-mr"].subject), 48)
    assert len(hidden["eye-fundus"].features) == len(hidden["eye-fundus"].pixels)


def picture(png):
    return Image.open(io.BytesIO(base64.b64decode(png)))


def test_the_middle_slice_and_its_patches(make_run):
    """By hand: 8 x 8 x 4 voxels in patches of 4 x 4 x 4, and 4 x 4 x 4 voxels in patches of 2 x 2 x 2."""
    brain = make_run().streams["brain-mr"]
    shown, token = _in_slice(brain, np.arange(4))
    assert shown.all()
    assert token.tolist() == [0, 1, 2, 3]
    small = brain.model_copy(update={"shape": (4, 4, 4), "patch": (2, 2, 2)})
    shown, token = _in_slice(small, np.arange(8))
    assert shown.tolist() == [False, True] * 4  # the second layer of patches holds slice 2
    assert token[shown].tolist() == [0, 1, 2, 3]
    volume = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
    assert torch.equal(_middle(small, volume), volume[..., 2])
    assert _slice_patches(small, volume)[0, 1].tolist() == [10.0, 14.0, 26.0, 30.0]


def test_pooled_experts_are_read_off_the_shared_model(make_run, make_store, tmp_path):
    run = make_run('[model]\nsize = "nano"\nbackbone = "director-experts"\n[sharing]\nexperts = "pooled"\n')
    model, opened = build_model(run), cohort(run, make_store)
    experts = expert_map(run, RunFolder(tmp_path, run), model, opened)
    assert [(row.site, row.stream) for row in experts.rows] == [("", stream) for stream in run.streams]
    assert all(sum(row.shares) == pytest.approx(1.0, abs=1e-3) for row in experts.rows)
    assert experts.layer == list(model.director_experts())[-1]


def test_a_dense_model_and_private_experts_elsewhere_have_no_map(make_run, make_store, tmp_path):
    run = make_run()
    assert expert_map(run, RunFolder(tmp_path, run), build_model(run), cohort(run, make_store)) is None
    private = make_run('[model]\nsize = "nano"\nbackbone = "director-experts"\n')
    assert expert_map(private, RunFolder(tmp_path, private), build_model(private), cohort(private, make_store)) is None
