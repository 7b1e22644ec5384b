import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from panfm.anatomy import Modality
from panfm.data.intensity import apply_intensity


def test_ct_shows_minus_200_to_400_hu():
    image = np.array([-1000, -200, 100, 400, 3000], dtype=np.int16)
    np.testing.assert_allclose(apply_intensity(image, Modality.CT), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("modality", sorted(set(Modality) - {Modality.CT, Modality.MR, Modality.PET}))
def test_grey_levels_are_divided_by_255(modality):
    image = np.array([0, 51, 255], dtype=np.uint8)
    np.testing.assert_allclose(apply_intensity(image, modality), [0, 0.2, 1], rtol=1e-6)


@pytest.mark.parametrize("modality", [Modality.MR, Modality.PET])
def test_mr_and_pet_are_clipped_at_their_own_percentiles(modality):
    image = np.arange(101, dtype=np.float64) * 7 - 50  # percentiles 1 and 99 are entries 1 and 99
    np.testing.assert_allclose(apply_intensity(image, modality)[[0, 1, 50, 99, 100]], [0, 0, 0.5, 1, 1], atol=1e-6)


def test_z_score_before_min_max_changes_nothing():
    image = np.random.default_rng(0).gamma(2.0, 50.0, (6, 7, 8))
    clipped = np.clip(image, *np.percentile(image, (1, 99)))
    score = (clipped - clipped.mean()) / clipped.std()
    expected = (score - score.min()) / (score.max() - score.min())
    np.testing.assert_allclose(apply_intensity(image, Modality.PET), expected, atol=1e-5)


def test_mostly_empty_scan_keeps_its_few_voxels():
    image = np.zeros(1000)
    image[0], image[1] = 10, 5
    np.testing.assert_allclose(apply_intensity(image, Modality.MR)[:3], [1, 0.5, 0])


@pytest.mark.parametrize("value", [0, -7, 1e6])
@pytest.mark.parametrize("modality", [Modality.MR, Modality.PET])
def test_constant(modality, value):
    assert not apply_intensity(np.full((3, 3), value), modality).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("modality", [Modality.MR, Modality.CT, Modality.XRAY])
def test_non_finite_is_refused(modality, bad):
    with pytest.raises(ValueError, match="1 voxels are NaN or infinite"):
        apply_intensity(np.array([1.0, bad]), modality)


_IMAGES = arrays.arrays(
    st.sampled_from([np.int16, np.uint8, np.float32, np.float64]),
    arrays.array_shapes(min_dims=1, max_dims=3, max_side=5),
    elements={"min_value": 0, "max_value": 255},
)


@given(_IMAGES, st.sampled_from(list(Modality)))
def test_bounded_and_monotone(image, modality):
    scaled = apply_intensity(image, modality)
    assert scaled.dtype == np.float32
    assert scaled.shape == image.shape
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    order = np.argsort(image, axis=None, kind="stable")
    assert (np.diff(scaled.ravel()[order]) >= 0).all()
