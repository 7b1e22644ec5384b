"""Patch embeddings and positions of streams, from public ones: by hand, and against the images that they stand for."""

import pytest
import torch
from torch.nn import functional

from panfm.config import StreamConfig
from panfm.config.start import StartConfig
from panfm.errors import DataError
from panfm.models.public_start import resized_kernel, stream_kernel, stream_positions
from panfm.models.public_weights import IMAGENET, NONE, PublicWeights


def public(kernel, positions=None, normalisation=NONE):
    bias = torch.arange(len(kernel), dtype=torch.float32)
    return PublicWeights("dinov2", "", {}, kernel, bias, positions, None, 1e-6, normalisation)


def stream(*shape, patch, channels=1):
    more = {"spacing-mm": (1.0, 1.0, 1.0)} if len(shape) == 3 else {}
    return StreamConfig.model_validate({"shape": shape, "patch": patch, "channels": channels, **more})


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_pixels_are_standardised_within_the_kernel():
    kernel = random(4, 3, 2, 2)
    made, bias = stream_kernel(stream(4, 4, patch=(2, 2), channels=3), StartConfig(), public(kernel, None, IMAGENET))
    image = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in IMAGENET)
    wanted = functional.conv2d((image - mean) / std, kernel, torch.arange(4.0), stride=2)
    torch.testing.assert_close(functional.conv2d(image, made, bias, stride=2), wanted, rtol=1e-5, atol=1e-5)


def test_grey_answers_as_the_same_picture_in_three_channels():
    source = public(random(4, 3, 2, 2), None, IMAGENET)
    colour, grey = (stream_kernel(stream(4, 4, patch=(2, 2), channels=n), StartConfig(), source) for n in (3, 1))
    image = torch.rand(1, 1, 4, 4)
    found = functional.conv2d(image, *grey, stride=2)
    torch.testing.assert_close(found, functional.conv2d(image.expand(-1, 3, -1, -1), *colour, stride=2))


@pytest.mark.parametrize("patch", [(6, 6), (4, 7), (16, 16)])
def test_a_larger_kernel_answers_to_the_larger_image_alike(patch):
    kernel, image = random(5, 3, 4, 4).double(), random(2, 3, 4, 4).double()
    larger = functional.interpolate(image, patch, mode="bilinear", align_corners=False, antialias=True)
    found = functional.conv2d(larger, resized_kernel(kernel, patch))
    torch.testing.assert_close(found, functional.conv2d(image, kernel))


def test_a_smaller_kernel_answers_to_flat_images_alike():
    kernel = random(5, 3, 8, 8).double()
    assert resized_kernel(kernel, (8, 8)) is kernel
    flat = functional.conv2d(torch.ones(1, 3, 8, 8).double(), kernel)
    smaller = resized_kernel(kernel, (4, 4))
    assert smaller.shape == (5, 3, 4, 4)
    smooth = functional.interpolate(random(1, 3, 2, 2).double(), (8, 8), mode="bicubic") + 1.0
    small = functional.interpolate(smooth, (4, 4), mode="bilinear", antialias=True)
    wanted, found = functional.conv2d(smooth, kernel).flatten(), functional.conv2d(small, smaller).flatten()
    assert flat.isfinite().all()
    assert torch.corrcoef(torch.stack([wanted, found]))[0, 1] > 0.5


@pytest.mark.parametrize(("axis", "place"), [("R", 2), ("A", 3), ("S", 4)])
def test_a_volume_that_is_one_slice_repeated_answers_as_the_slice(axis, place):
    source = public(random(4, 3, 2, 2))
    slice_, bias = stream_kernel(stream(4, 4, patch=(2, 2)), StartConfig(), source)
    sizes, patch = [4, 4, 4], [2, 2, 2]
    sizes[place - 2], patch[place - 2] = 6, 3
    for inflate in ("mean", "centre"):
        start = StartConfig(inflate=inflate, inflate_axis=axis)
        kernel, _ = stream_kernel(stream(*sizes, patch=tuple(patch)), start, source)
        image = torch.rand(1, 1, 4, 4)
        volume = image.unsqueeze(place).expand(*[6 if dim == place else -1 for dim in range(5)])
        found = functional.conv3d(volume, kernel, bias, stride=patch).select(place, 0)
        torch.testing.assert_close(found, functional.conv2d(image, slice_, bias, stride=2))
        depth = kernel.movedim(place, -1)
        assert bool(depth[..., 0].any()) == (inflate == "mean")
        assert depth[..., 1].any()


def test_positions_by_hand_and_repeated_along_the_depth():
    table = torch.arange(4.0)[:, None] * torch.ones(1, 3)
    source = public(random(3, 3, 2, 2), table)
    same = stream_positions(stream(4, 4, patch=(2, 2)), StartConfig(), source)
    assert torch.equal(same, table)
    deep = stream_positions(stream(4, 6, 4, patch=(2, 2, 2)), StartConfig(inflate="mean", inflate_axis="A"), source)
    assert deep.shape == (12, 3)
    assert deep[:, 0].tolist() == [0.0, 1.0] * 3 + [2.0, 3.0] * 3
    wide = stream_positions(stream(4, 8, patch=(2, 2)), StartConfig(), source)
    wanted = functional.interpolate(table.view(1, 2, 2, 3).permute(0, 3, 1, 2), (2, 4), mode="bicubic")
    torch.testing.assert_close(wide, wanted[0].permute(1, 2, 0).reshape(8, 3))


def test_another_number_of_channels_is_refused():
    with pytest.raises(DataError, match=r"^start\.model: the patch embedding reads 4 channels, expected 3$"):
        stream_kernel(stream(4, 4, patch=(2, 2)), StartConfig(), public(random(4, 4, 2, 2)))
