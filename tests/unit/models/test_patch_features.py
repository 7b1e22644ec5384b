"""Stems: block statistics against a slow loop, patches against hand-cut ones."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from panfm.config import StreamConfig
from panfm.models.patch_features import (
    block_statistics,
    block_texture,
    image_features,
    intensities,
    num_patch_features,
    patch_step,
    patchify,
)

VOLUME = StreamConfig(shape=(8, 8, 4), patch=(4, 4, 2), spacing_mm=(1.0, 1.0, 1.0))
COLOUR = StreamConfig(shape=(8, 4), patch=(4, 4), channels=3)


def test_block_statistics_of_a_hand_computed_block():
    images = torch.tensor([0.0, 1.0, 1.0, 0.0]).reshape(1, 1, 4)
    features = block_statistics(images, (2,))
    mean, sd = (0.5 - 0.2) * 32, (math.log(0.5 + 0.01) + 3.0) * 4
    gradient = (0.5 - 0.03) * 160  # |1-0|, |1-1|, |0-1| and none at the end
    assert_close(features, torch.tensor([[[mean, mean], [sd, sd], [gradient, gradient]]]))


@pytest.mark.parametrize(("shape", "block"), [((8, 8, 4), (2, 4, 2)), ((6, 4), (3, 2))])
def test_block_statistics_equal_a_slow_loop(shape, block):
    images = torch.rand(2, 2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = block_statistics(images, block)
    for index in itertools.product(*(range(size // step) for size, step in zip(shape, block, strict=True))):
        window = tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, block, strict=True))
        values = images[(slice(None), slice(None), *window)].flatten(2)
        assert_close(features[(slice(None), slice(0, 2), *index)], (values.mean(-1) - 0.2) * 32)
        expected = ((values.std(-1, correction=0) + 0.01).log() + 3) * 4
        assert_close(features[(slice(None), slice(2, 4), *index)], expected)


@pytest.mark.parametrize("measure", [block_statistics, block_texture])
def test_a_constant_image_has_finite_statistics(measure):
    features = measure(torch.full((1, 1, 4, 4, 4), 0.3), (2, 2, 2))
    assert torch.isfinite(features).all()


def test_block_texture_of_a_hand_computed_image():
    """Rows of 0 and 1 in turn: steps along the first axis and both diagonals change, steps along the second do not."""
    image = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).reshape(1, 1, 2, 2)
    mean, log_sd, down, along, falling, rising = block_texture(image, (2, 2)).flatten()
    assert_close(mean, torch.tensor((0.5 - 0.3) * 16))
    assert_close(log_sd, torch.tensor((math.log(0.51) + 3.0) * 4))
    assert_close(down, torch.tensor((math.log(2 / 4 + 0.001) + 3.5) * 8))  # both columns, of four pixels
    assert_close(along, torch.tensor((math.log(0.001) + 3.5) * 8))
    assert_close(falling, torch.tensor((math.log(1 / 4 + 0.001) + 3.5) * 8))  # (0, 0) to (1, 1) alone lies inside
    assert_close(rising, torch.tensor((math.log(1 / 4 + 0.001) + 3.5) * 8))  # (0, 1) to (1, 0)


@pytest.mark.parametrize(("shape", "block"), [((8, 8, 4), (2, 4, 2)), ((6, 4), (3, 2))])
def test_block_texture_equals_a_slow_loop(shape, block):
    images = torch.rand(2, 2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = block_texture(images, block)
    for number, (first, second) in enumerate([(1, 0), (0, 1), (1, 1), (1, -1)]):
        change = torch.zeros_like(images)
        for i, j in itertools.product(range(shape[0]), range(shape[1])):
            if 0 <= i + first < shape[0] and 0 <= j + second < shape[1]:
                change[:, :, i, j] = (images[:, :, i + first, j + second] - images[:, :, i, j]).abs()
        for index in itertools.product(*(range(size // step) for size, step in zip(shape, block, strict=True))):
            window = tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, block, strict=True))
            expected = (change[(slice(None), slice(None), *window)].flatten(2).mean(-1) + 0.001).log()
            at = (slice(None), slice(4 + 2 * number, 6 + 2 * number), *index)
            assert_close(features[at], (expected + 3.5) * 8)


def test_a_mirrored_image_swaps_the_diagonals():
    image = torch.rand(1, 1, 8, 8, 4, generator=torch.Generator().manual_seed(1))
    features, mirrored = block_texture(image, (8, 8, 4)), block_texture(image.flip(3), (8, 8, 4))
    assert_close(mirrored[:, [0, 1, 2, 3, 5, 4]], features)


@pytest.mark.parametrize("tokenizer", ["statistics", "texture", "patch"])
def test_intensities_are_those_of_the_image(tokenizer):
    image = torch.full((1, 1, *VOLUME.shape), 0.4)
    patches = patchify(image_features(image, VOLUME, tokenizer), patch_step(VOLUME, tokenizer))
    found = intensities(patches, VOLUME, tokenizer)
    assert_close(found, torch.full_like(found, 0.4))
    assert found.shape[-1] == (32 if tokenizer == "patch" else 8)


@pytest.mark.parametrize("tokenizer", ["statistics", "texture", "patch"])
@pytest.mark.parametrize("stream", [VOLUME, COLOUR])
def test_tokens_have_the_promised_number_of_features(stream, tokenizer):
    images = torch.rand(3, stream.channels, *stream.shape, generator=torch.Generator().manual_seed(0))
    tokens = patchify(image_features(images, stream, tokenizer), patch_step(stream, tokenizer))
    assert tokens.shape == (3, math.prod(stream.grid), num_patch_features(stream, tokenizer))


def test_patches_are_row_major_and_hold_their_own_voxels():
    image = torch.arange(32.0).reshape(1, 2, 4, 4)
    tokens = patchify(image, (2, 2))
    assert_close(tokens[0, 1], torch.tensor([2.0, 3, 6, 7, 18, 19, 22, 23]))
    assert_close(tokens[0, 2], torch.tensor([8.0, 9, 12, 13, 24, 25, 28, 29]))
