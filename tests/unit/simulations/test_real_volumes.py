"""The study of volumes: slices, tokens in their places, and every arm on a few scans."""

import os

import numpy as np
import pytest
import safetensors.torch
import torch
import typer

from panfm.models import build_model
from simulations.cohorts.prepare import WEIGHTS
from simulations.cohorts.real_images import HIPPOCAMPUS
from simulations.harness import ArmJob, CohortJob, StudyOptions
from simulations.studies import _start_arms as public
from simulations.studies import _volume_readings as readings
from simulations.studies import real_volumes_study as study
from simulations.studies._volume_readings import Reading
from tests.unit.models.test_public_weights import random_dinov2

needs_volumes = pytest.mark.skipif("PANFM_REAL_DATA" not in os.environ, reason="PANFM_REAL_DATA is not set")


def test_slices_run_across_the_second_axis_and_keep_left_and_top():
    """Slice k of a volume of 48 voxels along A lies at 4 k + 2; a side of 112 pixels shows 56 voxels."""
    volume = torch.zeros(1, 1, 56, 48, 28)
    volume[0, 0, :, 2] = 0.5
    volume[0, 0, 28:, 46, :14] = 1.0
    slices = readings.coronal_slices(volume)
    assert slices.shape == (12, 1, 112, 112)
    assert slices[0, 0, 10:100, 4:52].mean() == pytest.approx(0.5)
    assert slices[0, 0, :, 60:].abs().max() == 0.0
    assert slices[11, 0, 60:, :24].mean() == pytest.approx(1.0, abs=1e-3)
    assert slices[11, 0, :52].abs().max() < 1e-3
    assert slices[1:11].abs().max() == 0.0


def test_tokens_in_place_are_their_main_directions_of_the_fitted_volumes(monkeypatch):
    """Tokens that vary along one axis alone keep their distances, wherever they lie; the others' mean is not used."""
    monkeypatch.setattr(readings, "DIRECTIONS", 1)
    axis = np.array([0.6, 0.8, 0.0], dtype=np.float32)
    amounts = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    fit, test = (Reading(np.zeros((len(part), 1)), part[..., None] * axis + 5.0) for part in (amounts[:5], amounts[5:]))
    first, second = readings.in_place(fit, test)
    assert first.shape == (5, 4)
    sign = np.sign(first[0, 0] * (amounts[0, 0] - amounts[:5].mean()))
    np.testing.assert_allclose(sign * first, amounts[:5] - amounts[:5].mean(), atol=1e-5)
    np.testing.assert_allclose(sign * second, amounts[5:] - amounts[:5].mean(), atol=1e-5)


def test_a_volume_is_read_pooled_and_by_its_tokens(make_run, make_store):
    run = make_run('[features]\npooling = "cls+mean"\n')
    model, store = build_model(run, ["brain-mr"]), make_store(run, 3, complete=True)
    found = readings.read_volumes(model, store, "brain-mr")
    with torch.inference_mode():
        expected = model.embed(store.batch(np.arange(3), ["brain-mr"]))
    np.testing.assert_allclose(found.pooled, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert found.tokens.shape == (3, 4, 48)
    np.testing.assert_allclose(found.tokens.std(axis=-1), 1.0, atol=1e-2)


def test_without_weights_the_other_arms_go_on(monkeypatch, capsys):
    monkeypatch.delenv(WEIGHTS, raising=False)
    assert public.possible_arms(study.ARMS, study.WITHOUT_WEIGHTS) == list(study.WITHOUT_WEIGHTS)
    left_out = "start-slices, start-mean, start-centre, start-joint"
    assert capsys.readouterr().err == f"PANFM_WEIGHTS is not set: left out {left_out}\n"
    with pytest.raises(typer.BadParameter, match="start-slices: need PANFM_WEIGHTS"):
        public.possible_arms(["start-slices"], study.WITHOUT_WEIGHTS)


def test_answers_and_targets(monkeypatch):
    def run_arms(options, arms, length, write_draw, measure):
        means = {"statistics": 0.4, "untrained": 0.2, "views": 0.3}
        for draw, seed in options.pairs():
            for arm in arms:
                values = {"r2_mean": means[arm], "r2_mean_low": means[arm] - 0.1, "r2_mean_high": means[arm] + 0.1}
                placed = {f"-in-place:{metric}": value + 0.25 for metric, value in values.items()}
                yield ArmJob(draw, seed, arm, length, None), values | (placed if arm != "statistics" else {})

    monkeypatch.setattr(study, "run_arms", run_arms)
    result = study.run(StudyOptions(seeds=2, draws=None), 1, ["statistics", "untrained", "views"])
    assert result.ratios["r2_mean/views-minus-untrained"] == pytest.approx(0.1)
    assert result.ratios["r2_mean/views-in-place-minus-statistics"] == pytest.approx(0.15)
    assert [target.value for target in result.targets] == pytest.approx([-0.1, 0.15])
    assert [target.is_met for target in result.targets] == [False, True]


@needs_volumes
@pytest.mark.slow
def test_arms_on_a_few_volumes(tmp_path, monkeypatch):
    """Random public weights of two blocks; two local steps."""
    safetensors.torch.save_file(random_dinov2(patch=14), tmp_path / "vit.safetensors")
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "vit.safetensors"))
    nano = 'model={ size = "nano", tokenizer = "patch", positions = "learned", layer-scale = true }'
    monkeypatch.setattr(study, "SLICES", (*study.SLICES, nano, 'features={ pooling = "layers" }'))
    monkeypatch.setattr(readings, "TOKEN_BLOCK", 2)
    arm_run = study.arm_run

    def small_run(arm, seed, rounds):
        run = arm_run(arm, seed, rounds)
        train = run.train.model_copy(update={"local_steps": 2})
        streams = {name: run.streams[name] for name in (HIPPOCAMPUS, "heart-ct")}
        return run.model_copy(update={"train": train, "streams": streams, "cohort": run.cohort | {"limit": 40}})

    monkeypatch.setattr(study, "arm_run", small_run)
    cohort = study.write_draw(CohortJob(0, tmp_path / "cohort"))
    arms = ("statistics", "untrained", "untrained-coarse", "views", "start-slices", "start-mean", "start-joint")
    measured = {arm: study.measure(ArmJob(0, 0, arm, 1, cohort)) for arm in arms}
    of_probe = set(study.METRICS)
    assert measured.pop("statistics").keys() == of_probe
    for values in measured.values():
        assert values.keys() == of_probe | {f"-in-place:{metric}" for metric in of_probe}
        assert all(np.isfinite(value) for value in values.values())
    assert measured["untrained"] != measured["views"]
    assert measured["untrained"] != measured["untrained-coarse"]
