"""Public weights that read volumes slice by slice: a slice has the features that the same picture has."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from panfm.config import StreamConfig, load_run
from panfm.data.read import to_stream_grid
from panfm.data.store import Batch
from panfm.errors import ConfigError, DataError
from panfm.models.warm_start import start_model
from tests.unit.models.test_public_weights import FIELDS, random_dinov2

RUN = """
name = "slices"
[streams]
{stream}
[train]
parts = "all"
[model]
tokenizer = "patch"
{fields}
[start]
model = "{weights}"
"""
PICTURE = "brain-mr = {{ shape = {shape}, patch = {patch} }}"
VOLUME = "brain-mr = {{ shape = {shape}, patch = {patch}, spacing-mm = [1.0, 1.0, 1.0]{slices} }}"


@pytest.fixture
def make_model(tmp_path):
    """Makes the model of one stream that starts from weights of DINOv2's layout."""
    torch.save(random_dinov2(), tmp_path / "w.pth")

    def make(shape, patch, axis=""):
        slices = f', slices = "{axis}"' if axis else ""
        stream = (VOLUME if len(shape) == 3 else PICTURE).format(shape=shape, patch=patch, slices=slices)
        text = RUN.format(stream=stream, fields=FIELDS["dinov2"], weights=tmp_path / "w.pth")
        (tmp_path / "run.toml").write_text(text)
        return start_model(load_run(tmp_path / "run.toml")).eval()

    return make


def at(sizes, depth, size):
    """Sizes of a plane with one more along the depth."""
    return [*sizes[:depth], size, *sizes[depth:]]


def batch(images):
    return Batch(len(images), {"brain-mr": images}, {"brain-mr": torch.arange(len(images))})


@pytest.mark.parametrize(("axis", "depth"), [("R", 0), ("A", 1), ("S", 2)])
def test_a_volume_of_one_slice_has_the_features_of_the_picture(make_model, axis, depth):
    pictures = torch.rand(3, 1, 32, 40, generator=torch.Generator().manual_seed(0))
    picture, volume = (
        make_model([32, 40], [8, 8]),
        make_model(at([32, 40], depth, 1), at([8, 8], depth, 1), axis),
    )
    with torch.inference_mode():
        expected = picture.encode(picture.patch_features(batch(pictures)))
        encoded = volume.encode(volume.patch_features(batch(pictures.unsqueeze(2 + depth))))
        assert_close(encoded.cls, expected.cls, atol=1e-5, rtol=1e-5)
        assert_close(encoded.tokens, expected.tokens, atol=1e-5, rtol=1e-5)
        embedded = volume.embed(batch(pictures.unsqueeze(2 + depth)))
    assert_close(embedded, picture.embed(batch(pictures)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("axis", "depth"), [("R", 0), ("A", 1), ("S", 2)])
def test_every_slice_has_the_tokens_of_its_picture(make_model, axis, depth):
    """Before the first block, in which slices attend to one another."""
    volume = torch.rand(1, 1, *at([32, 32], depth, 3), generator=torch.Generator().manual_seed(0))
    picture, sliced = (
        make_model([32, 32], [8, 8]),
        make_model(at([32, 32], depth, 3), at([8, 8], depth, 1), axis),
    )
    with torch.inference_mode():
        tokens = sliced.streams["brain-mr"](sliced.patch_features(batch(volume)).images["brain-mr"])
        pictures = volume[0].movedim(1 + depth, 0)
        expected = picture.streams["brain-mr"](picture.patch_features(batch(pictures)).images["brain-mr"])
    by_place = tokens.unflatten(1, tuple(at([4, 4], depth, 3))).movedim(1 + depth, 1)[0].flatten(1, 2)
    assert_close(by_place, expected, atol=1e-6, rtol=1e-5)


def test_deeper_patches_are_refused_with_the_patch_to_write(make_model):
    with pytest.raises(ConfigError, match=r"brain-mr: patch: 4 voxels along A, slices along this axis need 1$"):
        make_model([32, 8, 32], [8, 4, 8], "A")
    with pytest.raises(DataError, match=r'set start\.inflate = "mean" or "centre", or streams\.brain-mr\.slices$'):
        make_model([32, 8, 32], [8, 4, 8])


def test_slices_are_those_of_the_scan():
    """A stream of slices takes slices unchanged: resampling smooths within a slice, and not across slices."""
    voxels = np.zeros((8, 8, 9), np.float32)
    voxels[..., 1::2] = 1.0
    voxels[:4, :, 4] = 0.5
    smooth = StreamConfig(spacing_mm=(1.0, 1.0, 4.0), shape=(8, 8, 3), patch=(4, 4, 1))
    found = to_stream_grid(voxels, np.eye(4), smooth.model_copy(update={"slices": "S"}))
    np.testing.assert_allclose(found[0], voxels[..., ::4], atol=1e-5)
    smoothed = to_stream_grid(voxels, np.eye(4), smooth)
    assert smoothed[0, 6, 6].min() > 0.2
    coarse = StreamConfig(spacing_mm=(2.0, 1.0, 4.0), shape=(4, 8, 3), patch=(4, 4, 1), slices="S")
    assert 0.0 < to_stream_grid(voxels, np.eye(4), coarse)[0, 2, 4, 1] < 0.25
