"""The phantom `textured`: what its texture shows, and to which measurements it shows nothing."""

import numpy as np
import pytest
import torch

from panfm.anatomy import DEFAULT_ORGANS
from panfm.config import load_run
from panfm.evaluate.statistics import measure_store
from panfm.models.patch_features import image_features
from simulations.cohorts.phantom_body import FACTORS, ORGANS, mixing
from simulations.cohorts.phantom_draw import PRESETS, Phantom
from simulations.cohorts.phantom_texture import CODES, code_loadings, directional_texture
from simulations.harness import QUICKSTART
from simulations.studies._phantoms import phantom_store

PHANTOM_SEED = 100
STREAMS = load_run(QUICKSTART).streams


def texture_of(codes, phases=0.0, leans=0.0):
    axis = np.linspace(-6.0, 6.0, 48)
    shape = (4, 2, 2)
    return directional_texture((axis, axis, axis), np.array(codes), np.full(shape, phases), np.full(shape, leans))


def power(change):
    return float(np.mean(np.square(change)))


def test_every_organ_has_two_codes_of_unit_variance():
    assert set(CODES) == set(ORGANS)
    latents = np.random.default_rng(0).standard_normal((20_000, len(FACTORS))) @ mixing().T
    for organ in ORGANS:
        np.testing.assert_allclose((latents @ code_loadings(organ)).var(axis=0), [1.0, 1.0], atol=0.05)


def test_codes_turn_the_texture():
    along, across = texture_of([9.0, 0.0]), texture_of([-9.0, 0.0])
    assert power(np.diff(along, axis=0)) > 1.5 * power(np.diff(along, axis=1))
    np.testing.assert_allclose(across, along.transpose(1, 0, 2), atol=1e-9)
    rising, falling = texture_of([0.0, 9.0]), texture_of([0.0, -9.0])
    np.testing.assert_allclose(falling, rising[:, ::-1], atol=1e-9)


def test_a_wave_without_a_lean_is_the_same_in_every_slice():
    flat, leaning = texture_of([1.0, -1.0]), texture_of([1.0, -1.0], leans=0.5)
    assert np.ptp(flat, axis=2).max() == 0.0
    assert np.ptp(leaning, axis=2).max() > 1.0


@pytest.mark.parametrize("codes", [(-2.0, 2.0), (0.0, 0.0), (2.0, 1.0)])
def test_power_does_not_depend_on_the_codes(codes):
    rng = np.random.default_rng(0)
    axis = np.linspace(-6.0, 6.0, 24)
    draws = [
        directional_texture((axis, axis, axis[:4]), np.array(codes), *rng.uniform(0, 2 * np.pi, (2, 4, 2, 2)))
        for _ in range(200)
    ]
    assert power(draws) == pytest.approx(1.0, abs=0.05)


def test_lobules_have_phases_of_their_own():
    axis, phases = np.linspace(-6.0, 6.0, 48), np.zeros((4, 2, 2))
    plain = directional_texture((axis, axis, axis[:1]), np.zeros(2), phases, np.zeros((4, 2, 2)))
    phases[:, 1, 0] = 1.0
    changed = directional_texture((axis, axis, axis[:1]), np.zeros(2), phases, np.zeros((4, 2, 2))) != plain
    assert changed[24:, :24].mean() > 0.9
    assert not changed[:24].any()
    assert not changed[24:, 24:].any()


@pytest.mark.parametrize("organ", ["brain", "pancreas"])
def test_same_seed_same_voxels_whatever_came_before(organ):
    first, second = Phantom("textured", 7), Phantom("textured", 7)
    second.render(second.draw("site-b", 3, [organ]), 1, organ)
    ours, theirs = (phantom.render(phantom.draw("site-a", 2, [organ]), 1, organ)[0] for phantom in (first, second))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == np.int16
    assert ours.shape == Phantom("lasting", 7).render(first.draw("site-a", 2, [organ]), 1, organ)[0].shape


def test_few_patients_are_complete():
    subjects = Phantom("textured", PHANTOM_SEED).draw("site-a", 1000, DEFAULT_ORGANS)
    assert 0.0 < subjects.scanned.all(axis=1).mean() < 0.15
    weak = [DEFAULT_ORGANS.index(organ) for organ in ("brain", "kidney", "spleen", "pancreas")]
    assert 0.4 < subjects.scanned[:, weak].mean() < 0.75
    assert PRESETS["textured"].amplitude["pancreas"] < 0.7 * PRESETS["textured"].amplitude["heart"]


@pytest.fixture(scope="module")
def kidneys():
    """Codes of 240 patients' kidneys, as the factors give them, and their images."""
    phantom = Phantom("textured", PHANTOM_SEED)
    subjects = phantom.draw("site-a", 240, ["kidney"], complete=True)
    streams = {"kidney-mr": STREAMS["kidney-mr"]}
    return subjects.latents @ code_loadings("kidney"), phantom_store(phantom, subjects, streams), streams


def test_directional_differences_tell_the_codes(kidneys):
    codes, store, streams = kidneys
    features = image_features(torch.from_numpy(store.images["kidney-mr"]), streams["kidney-mr"], "texture").numpy()
    log_change = features.reshape(len(codes), 6, -1)[:, 2:, 1:-1].mean(axis=2)  # without the blocks of the vials
    for code, (one, other) in enumerate([(0, 1), (2, 3)]):
        assert np.corrcoef(codes[:, code], log_change[:, one] - log_change[:, other])[0, 1] > 0.6


def test_plain_statistics_hardly_tell_the_codes(kidneys):
    """The best of all statistics of the whole organ correlates no more with a code than chance and shared traits do."""
    codes, store, streams = kidneys
    values = measure_store(store, streams)["kidney-mr"].values[:, :10].astype(np.float64)
    centred = (values - values.mean(axis=0)) / (values.std(axis=0) + 1e-9)
    correlations = np.abs(centred.T @ ((codes - codes.mean(axis=0)) / codes.std(axis=0)) / len(codes))
    assert correlations.max() < 0.35
