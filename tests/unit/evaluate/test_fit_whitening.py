"""Within-image whitening: crops, sums, matrix against a slow reference, and what it does to embeddings."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.testing import assert_close

from panfm.config.features import FeaturesConfig
from panfm.errors import DataError
from panfm.evaluate.fit_whitening import (
    DifferenceSums,
    crop_and_resize,
    difference_sums,
    fit_whitening,
    whitening_matrix,
    whitening_of,
)
from panfm.models import build_model
from simulations.cohorts.opened import join_stores


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(5, 3, 8, 12), (4, 1, 6, 8, 4)])
def test_a_crop_has_the_images_size_and_range_and_a_flat_image_stays_flat(shape):
    images = torch.rand(shape, generator=generator())
    crops = crop_and_resize(images, generator(1))
    assert crops.shape == images.shape
    assert crops.min() >= images.min()
    assert crops.max() <= images.max()
    assert_close(crop_and_resize(torch.full(shape, 0.3), generator(1)), torch.full(shape, 0.3))
    assert torch.equal(crops, crop_and_resize(images, generator(1)))
    assert not torch.equal(crops, crop_and_resize(images, generator(2)))


@pytest.mark.parametrize("axes", [2, 3])
def test_a_crop_of_a_ramp_is_a_flatter_ramp_within_the_image(axes):
    """The slope of a ramp tells the side of the crop: between a share of 1/2 and all of area or volume."""
    size = 64
    ramp = torch.linspace(0, 1, size).view(-1, *[1] * (axes - 1)).expand(200, 1, *[size] + [4] * (axes - 1))
    crops = crop_and_resize(ramp.contiguous(), generator(3))[:, 0].flatten(2).mean(2)
    slopes = (crops[:, 40] - crops[:, 20]) / (20 / (size - 1))
    assert slopes.min() > 0.5 ** (1 / axes) - 0.01
    assert slopes.max() < 1.01
    shares = slopes**axes
    assert abs(float(shares.mean()) - 0.75) < 0.03
    assert float(shares.min()) < 0.55
    assert float(shares.max()) > 0.95


def test_the_matrix_by_hand():
    """Differences along the first axis only, e = (4, 0), mean 2: (2 + 1)^(-1/2) and 1."""
    assert_allclose(whitening_matrix(np.diag([4.0, 0.0]), 1.0), np.diag([3**-0.5, 1.0]), atol=1e-12)
    assert_allclose(whitening_matrix(np.zeros((3, 3)), 1.0), 2**-0.5 * np.eye(3))


@pytest.mark.parametrize("lambda_", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_matrix_is_symmetric_and_the_inverse_root_of_its_definition(lambda_, rows):
    differences = np.random.default_rng(0).normal(size=(rows, 6)) * np.arange(1, 7)
    products = differences.T @ differences
    matrix = whitening_matrix(products, lambda_)
    assert np.array_equal(matrix, matrix.T)
    inside = products / (np.trace(products) / 6) + lambda_ * np.eye(6)
    assert_allclose(matrix @ inside @ matrix, np.eye(6), atol=1e-9)


@pytest.fixture
def run(make_run):
    return make_run('[features]\npooling = "cls+mean"\nwhitening = true\nwhitening-crops = 30\n')


def test_sums_are_those_of_a_slow_loop(run, make_store):
    model, store = build_model(run), make_store(run, 6)
    sums = difference_sums(model, store, 4, 0)
    assert list(sums) == list(run.streams)
    order, rows = generator_order(store, "heart-ct", 4)
    whole, part = [], []
    with torch.inference_mode():
        batch = store.batch(rows)
        cropped = dict(batch.images)
        cropped["heart-ct"] = crop_and_resize(batch.images["heart-ct"], order)
        for place, row in enumerate(rows):
            alone = store.batch([row])
            whole.append(model.embed(alone)[0].double().numpy())
            for name in alone.images:
                position = batch.rows[name].tolist().index(place)
                alone.images[name].copy_(cropped[name][position : position + 1])
            part.append(model.embed(alone)[0].double().numpy())
    differences = np.array(part) - np.array(whole)
    assert float(sums["heart-ct"].count) == 4
    assert_allclose(sums["heart-ct"].x, np.sum(whole, axis=0), atol=1e-5)
    assert_allclose(sums["heart-ct"].xx, np.square(whole).sum(axis=0), atol=1e-5)
    assert_allclose(sums["heart-ct"].dd, differences.T @ differences, atol=1e-6)


def generator_order(store, stream, crops):
    """The generator after it drew the order of the patients, and the patients in that order."""
    from panfm.seeds import torch_generator

    drawn = torch_generator(0, "crops", stream)
    holders = store.rows[stream]
    order = torch.randperm(len(holders), generator=drawn).numpy()
    return drawn, holders[np.resize(order, crops)]


def test_sums_of_sites_add_up_and_a_lone_site_has_its_own(run, make_store):
    model = build_model(run)
    stores = {"one": make_store(run, 6, seed=1), "two": make_store(run, 6, seed=2)}
    own = fit_whitening(model, {"one": stores["one"]}, run.features, 0)
    both = fit_whitening(model, stores, run.features, 0)
    again = fit_whitening(model, dict(reversed(stores.items())), run.features, 0)
    assert not torch.equal(own.matrix, both.matrix)
    assert_close(again.matrix, both.matrix, atol=1e-5, rtol=1e-4)
    assert own.matrix.shape == (3, 96, 96)


def test_only_training_images_count_and_streams_without_any_take_the_sums_of_the_others(run, make_store):
    model, store = build_model(run), make_store(run, 20)
    with_more = join_stores([store, make_store(run, 5, seed=4)])
    held_out = type(store)(with_more.subjects, ("train",) * 20 + ("test",) * 5, with_more.images, with_more.rows)
    first, second = (fit_whitening(model, {"one": place}, run.features, 0) for place in (store, held_out))
    assert torch.equal(first.matrix, second.matrix)
    sums = difference_sums(model, store, 30, 0)
    few = {name: sums[name] for name in ("brain-mr", "eye-fundus")}
    whitening = whitening_of(run.streams, few, 1.0)
    joint = whitening_of(["all"], {"all": few["brain-mr"] + few["eye-fundus"]}, 1.0)
    assert torch.equal(whitening.matrix[1], joint.matrix[0])
    with pytest.raises(DataError, match="found no training image of the model's streams"):
        fit_whitening(model, {}, run.features, 0)


@torch.no_grad()
def test_a_whitened_embedding_is_the_mean_over_the_patients_streams(run, make_store):
    model, store = build_model(run).eval(), make_store(run, 8)
    batch = store.batch(np.arange(8))
    plain = model.embed(batch)
    model.whitening = whitening = fit_whitening(model, {"one": store}, run.features, 0)
    whitened, present = model.embed(batch), model.present(batch)
    for subject in range(8):
        parts = [
            (plain[subject] - whitening.centre[stream]) / whitening.scale[stream] @ whitening.matrix[stream]
            for stream in present[subject].nonzero().flatten().tolist()
        ]
        assert_close(whitened[subject], torch.stack(parts).mean(0), atol=1e-4, rtol=1e-4)
    assert (model.embed(store.batch([], None)).shape) == (0, 96)
    assert not model.state_dict().keys() & {"whitening.centre", "whitening.scale", "whitening.matrix"}
    assert not any(name.startswith("whitening") for name in model.parameter_groups())


@torch.no_grad()
def test_crops_move_whitened_embeddings_less(make_run, make_store):
    run = make_run('[features]\npooling = "layers"\nwhitening = true\n')
    model, store = build_model(run).eval(), make_store(run, 40, complete=True)
    whitening = fit_whitening(model, {"one": store}, run.features, 0)
    batch = store.batch(np.arange(40), ("eye-fundus",))
    moved = dict(batch.images)
    moved["eye-fundus"] = crop_and_resize(moved["eye-fundus"], generator(9))
    cropped = type(batch)(batch.size, moved, batch.rows)

    def ratio():
        whole, part = model.embed(batch), model.embed(cropped)
        return float((part - whole).square().sum() / (whole - whole.mean(0)).square().sum())

    plain_scale = model.embed(batch).std(0).clamp_min(1e-6)
    whole, part = model.embed(batch) / plain_scale, model.embed(cropped) / plain_scale
    before = float((part - whole).square().sum() / (whole - whole.mean(0)).square().sum())
    model.whitening = whitening
    assert ratio() < before


def test_constant_features_keep_their_scale():
    sums = DifferenceSums(np.array(4.0), np.array([4.0, 8.0]), np.array([4.0, 20.0]), np.eye(2))
    whitening = whitening_of(["one"], {"one": sums}, 1.0)
    assert whitening.scale.tolist() == [[1.0, 1.0]]
    assert whitening.centre.tolist() == [[1.0, 2.0]]


def test_a_fixed_lambda_is_bounded_below():
    assert FeaturesConfig().whitening_lambda == 1.0
    assert FeaturesConfig.model_fields["whitening_lambda"].metadata[0].ge == 0.1
