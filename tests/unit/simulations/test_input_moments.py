"""Constants of a stream's inputs: sums of sites give what the images in one place give, and inputs become standard."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from panfm.config.model import TOKENIZER_INPUTS
from panfm.models.patch_features import image_features, intensities, patch_step, patchify, tokenizer_inputs
from simulations.cohorts.opened import join_stores
from simulations.input_moments import InputMoments


def everyone(store):
    return np.arange(len(store.subjects))


@pytest.mark.parametrize("tokenizer", ["statistics", "texture", "patch"])
@pytest.mark.parametrize("name", ["brain-mr", "eye-fundus"])
def test_sums_over_sites_make_inputs_standard(make_run, make_store, name, tokenizer):
    run = make_run()
    stream, stores = run.streams[name], [make_store(run, size, seed=size) for size in (5, 9)]
    parts = [InputMoments.measure(store, name, stream, tokenizer, everyone(store)) for store in stores]
    centre, scale = InputMoments.sum(parts).constants()
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


def test_only_the_named_subjects_are_measured(make_run, make_store):
    run = make_run()
    store = make_store(run, 6, complete=True)
    found = InputMoments.measure(store, "eye-fundus", run.streams["eye-fundus"], "patch", np.array([1, 4]))
    assert found.count == 2 * 8 * 8
    expected = torch.from_numpy(store.images["eye-fundus"][[1, 4]]).double().sum(dim=(0, 2, 3))
    assert_close(found.total, expected)


def test_an_input_that_does_not_vary_is_scaled_as_if_it_did():
    flat = InputMoments(4, torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    assert flat.constants() == ([0.5], [1e4])
