"""Constants of a stream's inputs: sums of sites give what the images in one place give, and inputs become standard."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from panfm.config import StreamConfig
from panfm.config.model import TOKENIZER_INPUTS
from panfm.data.store import ImageStore
from panfm.errors import ConfigError, ProtocolError
from panfm.evaluate.input_sums import (
    InputSums,
    measured_constants,
    neutral_constants,
    values_per_image,
    with_constants,
)
from panfm.models.patch_features import image_features, intensities, patch_step, patchify, tokenizer_inputs
from simulations.cohorts.opened import join_stores


def everyone(store):
    return np.arange(len(store.subjects))


@pytest.mark.parametrize("tokenizer", ["statistics", "texture", "patch"])
@pytest.mark.parametrize("name", ["brain-mr", "eye-fundus"])
def test_sums_over_sites_make_inputs_standard(make_run, make_store, name, tokenizer):
    run = make_run()
    stream, stores = run.streams[name], [make_store(run, size, seed=size) for size in (5, 9)]
    parts = [InputSums.of(store, name, stream, tokenizer, everyone(store)) for store in stores]
    centre, scale = (parts[0] + parts[1]).constants()
    together = join_stores(stores)
    images = torch.from_numpy(together.images[name])
    inputs = tokenizer_inputs(images, stream, tokenizer).double().transpose(0, 1).flatten(1)
    assert centre == pytest.approx(inputs.mean(1).tolist(), rel=1e-3)
    assert scale == pytest.approx((1 / inputs.std(1, correction=0)).tolist(), rel=1e-3)
    declared = stream.model_copy(update={"input_centre": tuple(centre), "input_scale": tuple(scale)})
    standard = image_features(images, declared, tokenizer).transpose(0, 1).flatten(1)
    assert_close(standard.mean(1), torch.zeros(len(centre)), atol=2e-2, rtol=0.0)
    assert_close(standard.std(1), torch.ones(len(centre)), atol=1e-2, rtol=0.0)
    patches = patchify(image_features(images, declared, tokenizer), patch_step(stream, tokenizer))
    raw = patchify(tokenizer_inputs(images, stream, tokenizer), patch_step(stream, tokenizer))
    size = raw.shape[-1] // TOKENIZER_INPUTS[tokenizer]
    assert_close(intensities(patches, declared, tokenizer), raw[..., :size], atol=1e-5, rtol=1e-5)


def test_one_image_of_each_named_subject_is_summed(make_run, make_store):
    run = make_run()
    name, stream = "eye-fundus", run.streams["eye-fundus"]
    store = make_store(run, 6, complete=True)
    sums = InputSums.of(store, name, stream, "patch", np.array([1, 4]))
    assert sums.count == 2 * 8 * 8 == 2 * values_per_image(stream, "patch")
    expected = store.images[name][[1, 4]].astype(np.float64)
    np.testing.assert_allclose(sums.total, expected.sum(axis=(0, 2, 3)))
    np.testing.assert_allclose(sums.squares, (expected**2).sum(axis=(0, 2, 3)))
    again = {**store.rows, name: np.array([0, 1, 1, 1, 2, 4])}
    visits = ImageStore(store.subjects, store.splits, store.images, again)
    first = InputSums.of(visits, name, stream, "patch", np.array([1, 4]))
    np.testing.assert_allclose(first.total, store.images[name][[1, 5]].astype(np.float64).sum(axis=(0, 2, 3)))
    none = InputSums.of(visits, name, stream, "patch", np.array([3]))
    assert (float(none.count), none.total.tolist()) == (0.0, [0.0] * stream.channels)


def test_an_input_that_does_not_vary_is_scaled_as_if_it_did():
    flat = InputSums(np.array(4.0), np.array([2.0]), np.array([1.0]))
    assert flat.constants() == ([0.5], [1e4])


@pytest.mark.parametrize("tokenizer", ["statistics", "texture", "patch"])
@pytest.mark.parametrize("name", ["brain-mr", "eye-fundus"])
def test_neutral_constants_leave_inputs_as_they_are_without_any(make_run, make_store, name, tokenizer):
    run = make_run()
    run = run.model_copy(update={"model": run.model.model_copy(update={"tokenizer": tokenizer})})
    images = torch.from_numpy(make_store(run, 3, complete=True).images[name])
    neutral = with_constants(run, {name: neutral_constants(run, name)}).streams[name]
    assert_close(image_features(images, neutral, tokenizer), image_features(images, run.streams[name], tokenizer))


GREY = StreamConfig(shape=(8, 8), patch=(4, 4))


def message(subjects=2, **changed):
    images = np.random.default_rng(0).random((subjects, 1, 8, 8), dtype=np.float32)
    store = ImageStore(tuple("ab"[:subjects]), ("train",) * subjects, {"x": images}, {"x": np.arange(subjects)})
    return InputSums.of(store, "x", GREY, "patch", np.arange(subjects)).to_arrays() | changed


def test_a_message_is_read_back():
    flat = {name: array.ravel() for name, array in message().items()}
    sums = InputSums.from_arrays(flat, GREY, "patch", subjects=2)
    np.testing.assert_array_equal(sums.squares, message()["squares"])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (message(1), "input sums: of 64 values, expected 128 of its subjects"),
        (message(count=np.array(128.5)), "input sums: of 128.5 values"),
        (message(squares=np.array([1.0])), "that no images have together"),
        (message(total=np.array([1e4]), squares=np.array([1e9])), "that no images have together"),
        (message(total=np.array([np.nan])), "message: total holds NaN or inf"),
        (message(total=np.ones(3)), "message: total is float64"),
        (message(count=np.array(128.0, np.float32)), "message: count is float32"),
        ({}, r"message: found arrays \[\], expected"),
    ],
)
def test_sums_that_no_images_have_are_refused(bad, reason):
    with pytest.raises(ProtocolError, match=reason):
        InputSums.from_arrays(bad, GREY, "patch", subjects=2)


def test_constants_of_several_stores_are_those_of_all_images_in_one_place(make_run, make_store):
    run = make_run()
    stores = [make_store(run, size, seed=size) for size in (5, 9)]
    assert measured_constants(run, stores) == measured_constants(run, [join_stores(stores)])
    tested = ImageStore(stores[0].subjects, ("test",) * 5, stores[0].images, stores[0].rows)
    assert measured_constants(run, [tested]) == {}


def test_inputs_without_their_constants_are_refused():
    lacking = GREY.model_copy(update={"input_constants": "summed"})
    with pytest.raises(ConfigError, match=r"input-constants: .* computed before round 1"):
        image_features(torch.zeros(1, 1, 8, 8), lacking, "patch")
