"""Augmentation: by hand on ramps, against slow loops, and seeded by subject alone."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from panfm.config import StreamConfig, parse_run
from panfm.config.augment import Strengths
from panfm.data.augmentation import Augmentation, _affine, _field, _moved, _varied_intensities
from panfm.data.store import Batch

PICTURE = StreamConfig(shape=(6, 8), patch=(2, 2))
VOLUME = StreamConfig(shape=(4, 6, 8), patch=(2, 2, 2), spacing_mm=(2.0, 1.0, 1.0))
ZERO = {"rotation": 0.0, "brightness": 0.0, "contrast": 0.0, "gamma": 0.0, "blur": 0.0, "noise": 0.0}
NOTHING = Strengths(crop=(1.0, 1.0), flips=(), bias_field=0.0, **ZERO)
RUN = """
name = "small"
[streams]
brain-mr = { spacing-mm = [2.0, 1.0, 1.0], shape = [4, 6, 8], patch = [2, 2, 2] }
skin-photo = { shape = [8, 8], patch = [4, 4], channels = 3 }
"""
OFF = "crop = [1.0, 1.0]\n" + "".join(f"{key} = 0.0\n" for key in ZERO)


def strengths(**changed):
    return Strengths(**{**vars(NOTHING), **changed})


def draws(**changed):
    """Uniform numbers of one image: in the middle, or as given."""
    middle = {
        "area": [0.5],
        "offset": [0.5] * 3,
        "angle": [0.5] * 3,
        "flip": [0.9] * 3,
        "blur": [0.5],
        "field": [0.5] * 9,
    }
    middle |= {"gamma": [0.5], "contrast": [0.5], "brightness": [0.5], "noise": [0.5]}
    return {key: torch.tensor([changed.get(key, value)]) for key, value in middle.items()}


def ramps(stream):
    """Positions along every axis, in [-1, 1], [1, A, *shape]: a linear map of positions maps these exactly."""
    lines = [(2 * torch.arange(size) + 1.0) / size - 1.0 for size in stream.shape]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))[None]


def augmentation(extra=""):
    run = parse_run(RUN + "[augment]\n" + extra)
    return Augmentation(run.augment, run.streams)


def batch(size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = {"brain-mr": torch.rand(size, 1, 4, 6, 8, generator=generator)}
    images["skin-photo"] = torch.rand(size - 1, 3, 8, 8, generator=generator)
    return Batch(size, images, {"brain-mr": torch.arange(size), "skin-photo": torch.arange(1, size)})


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_nothing_changes_at_zero_strength():
    off = augmentation(OFF + "[augment.streams.brain-mr]\nbias-field = 0.0\n[augment.streams.skin-photo]\nflips = []\n")
    images = batch()
    varied = off.vary(images, generators(0, 1, 2))
    assert all(torch.equal(varied.images[name], image) for name, image in images.images.items())


@pytest.mark.parametrize("stream", [PICTURE, VOLUME])
def test_a_crop_of_a_ramp_is_a_flatter_ramp_that_is_shifted(stream):
    """A quarter (an eighth) of the image has half of its edges; the offset moves it from border to border."""
    share = 0.5 ** len(stream.shape)
    for offset, shift in ((0.5, 0.0), (1.0, 0.5), (0.0, -0.5)):
        found = _moved(ramps(stream), stream, strengths(crop=(share, share)), draws(offset=[offset] * 3))
        inside = ramps(stream).abs().amax(dim=1, keepdim=True) < (0.8 if shift == 0.0 else 0.6)
        inside &= (ramps(stream) * math.copysign(1, shift) < 0.4).all(dim=1, keepdim=True)
        expected = 0.5 * ramps(stream) + shift
        assert inside.any()
        assert_close(torch.where(inside, found, 0.0), torch.where(inside, expected, 0.0), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize(("stream", "names"), [(PICTURE, ("height", "width")), (VOLUME, ("R", "A", "S"))])
def test_a_flip_turns_one_axis_around(stream, names):
    images = torch.rand(1, 1, *stream.shape, generator=torch.Generator().manual_seed(0))
    for axis, name in enumerate(names):
        found = _moved(images, stream, strengths(flips=(name,)), draws(flip=[0.1] * 3))
        assert_close(found, images.flip(2 + axis), atol=1e-5, rtol=0.0)
        assert_close(
            _moved(images, stream, strengths(flips=(name,)), draws(flip=[0.6] * 3)), images, atol=1e-5, rtol=0.0
        )


def test_a_quarter_turn_of_a_square_picture():
    square = StreamConfig(shape=(6, 6), patch=(2, 2))
    image = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    found = _moved(image, square, strengths(rotation=math.pi / 2), draws(angle=[1.0] * 3))
    assert_close(found, image.rot90(-1, (2, 3)), atol=1e-5, rtol=0.0)


def test_rotations_keep_lengths_in_millimetres():
    """The axes have 8, 6 and 8 mm: positions in [-1, 1] are stretched, turned and brought back."""
    angles = [0.9, 0.2, 0.7]
    matrix, offset = _affine(VOLUME, strengths(rotation=0.5), draws(angle=angles))
    extent = torch.tensor([8.0, 6.0, 8.0])
    turned = matrix[0] * extent[:, None] / extent
    assert_close(turned.T @ turned, torch.eye(3), atol=1e-6, rtol=0.0)
    assert float(torch.linalg.det(turned)) == pytest.approx(1.0, abs=1e-6)
    assert not torch.allclose(turned, torch.eye(3), atol=0.05)
    assert offset.abs().max() == 0.0


def test_intensities_by_hand():
    image = torch.tensor([0.2, 0.4, 0.6]).reshape(1, 1, 1, 3)
    brighter = _varied_intensities(image, strengths(brightness=0.1), draws(brightness=[1.0]))
    assert_close(brighter, image * 1.1)
    flatter = _varied_intensities(image, strengths(contrast=0.5), draws(contrast=[0.0]))
    assert_close(flatter, torch.tensor([0.3, 0.4, 0.5]).reshape(1, 1, 1, 3))
    darker = _varied_intensities(image, strengths(gamma=0.5), draws(gamma=[1.0]))
    assert_close(darker, image ** math.exp(0.5))


def test_blur_mixes_in_neighbours_and_keeps_a_constant():
    image = torch.zeros(1, 1, 7, 7)
    image[0, 0, 3, 3] = 1.0
    blurred = _varied_intensities(image, strengths(blur=0.5), draws(blur=[1.0]))
    line = torch.tensor([math.erf((d + 0.5) / 2**0.5) - math.erf((d - 0.5) / 2**0.5) for d in range(-2, 3)]) / 2
    line /= line.sum()
    expected = 0.5 * image
    expected[0, 0, 1:6, 1:6] += 0.5 * torch.outer(line, line)
    assert_close(blurred, expected, atol=1e-3, rtol=0.0)
    assert_close(_varied_intensities(image * 0 + 0.3, strengths(blur=1.0), draws(blur=[1.0])), image * 0 + 0.3)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_a_bias_field_equals_a_slow_loop(shape):
    coefficients = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) - 0.5
    found = _field(coefficients, shape)
    for index in itertools.product(*(range(size) for size in shape)):
        place = [2 * i / (size - 1) - 1 for i, size in zip(index, shape, strict=True)]
        terms = place + [a * b for a, b in itertools.combinations_with_replacement(place, 2)]
        for image in range(2):
            logarithm = sum(float(c) * term for c, term in zip(coefficients[image], terms, strict=False))
            assert float(found[(image, 0, *index)]) == pytest.approx(math.exp(logarithm), rel=1e-5)


def test_a_subject_is_varied_alike_whoever_else_is_in_the_batch():
    varied, images = augmentation().vary(batch(), generators(5, 6, 7)), batch()
    alone = Batch(
        1,
        {"brain-mr": images.images["brain-mr"][2:], "skin-photo": images.images["skin-photo"][1:]},
        {"brain-mr": torch.tensor([0]), "skin-photo": torch.tensor([0])},
    )
    again = augmentation().vary(alone, generators(7))
    assert_close(again.images["brain-mr"][0], varied.images["brain-mr"][2], atol=1e-6, rtol=0.0)
    assert_close(again.images["skin-photo"][0], varied.images["skin-photo"][1], atol=1e-6, rtol=0.0)


def test_patch_features_are_not_taken_for_images():
    features = Batch(1, {"skin-photo": torch.zeros(1, 9, 4, 4)}, {"skin-photo": torch.tensor([0])})
    with pytest.raises(ValueError, match="skin-photo"):
        augmentation().vary(features, generators(0))


def test_the_generators_decide_and_go_on():
    """The same seed gives the same bits; a second view differs from the first."""
    one = generators(1, 2, 3)
    first, second = augmentation().vary(batch(), one), augmentation().vary(batch(), one)
    again = augmentation().vary(batch(), generators(1, 2, 3))
    for name in first.images:
        assert torch.equal(first.images[name], again.images[name])
        assert not torch.equal(first.images[name], second.images[name])


@pytest.mark.parametrize("key", ["crop", *ZERO, "bias-field", "flips"])
def test_every_strength_changes_images_that_stay_between_0_and_1(key):
    given = {"crop": "[0.3, 0.5]", "flips": '["A"]'}.get(key, "0.3")
    own = "[augment.streams.brain-mr]\nbias-field = 0.0\nflips = []\n"
    lines = [line for line in own.splitlines() if not line.startswith(key)]
    varied = augmentation(OFF + "\n".join([*lines, f"{key} = {given}"])).vary(batch(8), generators(*range(8)))
    found = varied.images["brain-mr"]
    assert not torch.allclose(found, batch(8).images["brain-mr"], atol=1e-3)
    assert torch.isfinite(found).all()
    assert found.min() >= 0.0
    assert found.max() <= 1.0


def test_maps_are_moved_as_their_images_are():
    """A map that equals its image comes out as the image, where only places are varied."""
    moving = augmentation(OFF.replace("crop = [1.0, 1.0]", "crop = [0.3, 1.0]"))
    images = batch()
    varied = moving.vary(images, generators(0, 1, 2)).images["skin-photo"]
    moved = moving.move("skin-photo", images.images["skin-photo"], generators(1, 2))
    assert not torch.equal(moved, images.images["skin-photo"])
    assert torch.allclose(moved.clamp(0.0, 1.0), varied)
