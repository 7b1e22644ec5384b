"""Resampling and blurring: small cases by hand, scipy as a reference, MONAI's bits."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from numpy.testing import assert_allclose

from panfm.data.resample import gaussian_kernel, reading_weights
from panfm.data.warp import blur, resample


def affine(factors, offsets):
    matrix = np.diag([*factors, 1.0]).astype(float)
    matrix[:-1, -1] = offsets
    return matrix


def random_case(number):
    random = np.random.default_rng(number)
    axes = 2 + number % 2
    shape = random.integers(3, 14, axes)
    images = torch.from_numpy(random.random((1 + number % 2, 1 + number % 3, *shape), dtype=np.float32))
    to_input = affine(random.uniform(0.3, 3.0, axes), random.normal(size=axes) * 3)
    sigmas = [float(sigma) if random.random() < 0.7 else 0.0 for sigma in random.uniform(0.05, 0.7, axes)]
    return images, to_input, [int(size) for size in random.integers(1, 14, axes)], sigmas


def kernels_of(sigmas):
    return [gaussian_kernel(sigma) if sigma else torch.ones(1) for sigma in sigmas]


def test_a_row_is_shifted_halved_and_filled_with_zeros():
    image = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    assert resample(image, affine([1, 1], [0, 1]), [1, 4]).flatten().tolist() == [2.0, 3.0, 4.0, 0.0]
    assert_allclose(resample(image, affine([1, 2], [0, 0.5]), [1, 2]).flatten(), [1.5, 3.5], atol=1e-6)
    assert_allclose(resample(image, affine([1, 0.5], [0, 0]), [1, 3]).flatten(), [1.0, 1.5, 2.0], atol=1e-6)


@pytest.mark.parametrize("number", range(4))
def test_resampling_is_that_of_scipy(number):
    images, to_input, shape, _ = random_case(number)
    expected = scipy.ndimage.affine_transform(
        images[0, 0].numpy(), to_input, output_shape=tuple(shape), order=1, mode="grid-constant"
    )
    assert_allclose(resample(images, to_input, shape)[0, 0], expected, atol=2e-4)


def test_a_kernel_is_the_gaussian_integrated_over_voxels():
    kernel = gaussian_kernel(1.0, cut_off=2.0)
    assert_allclose(kernel, [0.06060, 0.24173, 0.38292, 0.24173, 0.06060], atol=1e-5)
    assert len(gaussian_kernel(0.05)) == 3
    assert_allclose(gaussian_kernel(3.0).sum(), 1.0, atol=1e-4)


@pytest.mark.parametrize(("padding", "mode"), [("replicate", "nearest"), ("reflect", "mirror")])
def test_blur_is_that_of_scipy(padding, mode):
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 7, 8, 9), dtype=np.float32))
    kernels = kernels_of([0.4, 0.0, 0.7])
    expected = images.numpy()
    for axis, kernel in enumerate(kernels):
        expected = scipy.ndimage.correlate1d(expected, kernel.numpy(), axis=2 + axis, mode=mode)
    assert_allclose(blur(images, kernels, padding), expected, atol=1e-6)


@pytest.mark.parametrize("number", range(20))
def test_reading_weights_blur_and_resample_in_one_product(number):
    images, to_input, shape, sigmas = random_case(number)
    images = images[:1, :1]
    expected = resample(blur(images, kernels_of(sigmas), "replicate"), to_input, shape)[0, 0]
    image = images[0, 0]
    for axis, size in enumerate(shape):
        places = to_input[axis, -1] + to_input[axis, axis] * np.arange(size)
        weights = reading_weights(places, image.shape[axis], sigmas[axis])
        image = torch.tensordot(weights, image, dims=([1], [axis])).movedim(0, axis)
    assert_allclose(image, expected, atol=2e-4)


def test_reading_at_whole_voxels_copies_them():
    weights = reading_weights(np.array([-1.0, 0.0, 2.0, 3.0]), 3, 0.0)
    assert weights.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert reading_weights(np.array([0.25]), 2, 0.0).tolist() == [[0.75, 0.25]]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(30))
def test_the_bits_are_those_of_monai(number):
    from monai.networks.layers.convutils import gaussian_1d
    from monai.networks.layers.simplelayers import separable_filtering
    from monai.networks.layers.spatial_transforms import AffineTransform

    images, to_input, shape, sigmas = random_case(number)
    theirs = AffineTransform(shape, normalized=False, reverse_indexing=True, align_corners=False)
    assert torch.equal(resample(images, to_input, shape), theirs(images, torch.from_numpy(to_input).float()))
    kernels = [gaussian_1d(torch.tensor(sigma)) if sigma else torch.ones(1) for sigma in sigmas]
    assert all(torch.equal(ours, kernel) for ours, kernel in zip(kernels_of(sigmas), kernels, strict=True))
    assert torch.equal(blur(images, kernels, "replicate"), separable_filtering(images, kernels, mode="replicate"))
