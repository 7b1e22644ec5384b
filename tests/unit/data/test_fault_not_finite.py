"""Kind 4: finite input becomes NaN."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from panfm.anatomy import Modality
from panfm.config import StreamConfig
from panfm.data.cache import open_store
from panfm.data.intensity import apply_intensity
from panfm.data.read import prepare_volume, read_image
from panfm.errors import DataError

STREAM = StreamConfig(shape=(8, 8, 8), patch=(4, 4, 4), spacing_mm=(2.0, 2.0, 2.0))
ZERO = STREAM.model_copy(update={"nan": "zero"})
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    arrays.arrays(np.float32, arrays.array_shapes(max_dims=2, max_side=6), elements=FLOATS),
    st.sampled_from([Modality.MR, Modality.PET, Modality.CT]),
)
def test_whatever_is_finite_comes_out_finite_bounded_and_in_order(image, modality):
    scaled = apply_intensity(image, modality)
    assert np.isfinite(scaled).all()
    assert 0 <= scaled.min() <= scaled.max() <= 1
    assert (np.diff(scaled.ravel()[np.argsort(image, axis=None, kind="stable")]) >= 0).all()


@pytest.mark.parametrize(
    ("low", "high"), [(-3e38, 3e38), (-3.4e38, 0.0), (0.0, 3.4e38), (0.0, 1e-45), (-1e-40, 1e-40), (1e-45, 3e38)]
)
def test_the_ends_of_float32(low, high):
    image = np.linspace(low, high, 27, dtype=np.float64).astype(np.float32).reshape(3, 3, 3)
    prepared = prepare_volume(image, np.diag([2.0, 2.0, 2.0, 1.0]), "brain-mr", STREAM)
    assert np.isfinite(prepared).all()
    scaled = apply_intensity(image, Modality.MR)
    assert (scaled.min(), scaled.max()) == (0.0, 1.0)


def test_the_scale_of_a_wide_scan_is_that_of_a_narrow_one():
    image = np.random.default_rng(0).uniform(-1.0, 1.0, 500).astype(np.float32)
    expected = apply_intensity(image, Modality.MR)
    np.testing.assert_allclose(apply_intensity(image * np.float32(2.0**127), Modality.MR), expected, atol=1e-6)


def brain(background, dtype=np.float32):
    """Voxels of a head whose background is NaN after brain extraction."""
    voxels = np.random.default_rng(0).integers(100, 900, (8, 8, 8)).astype(dtype)
    voxels[:3] = background
    return voxels


def test_nan_in_the_background_is_refused_unless_the_stream_takes_it(site, tmp_path):
    site.add("a", voxels=brain(np.nan))
    line = site.assert_one_fault("a_brain-mr.nii.gz: found 192 voxels that are NaN or infinite, expected finite voxels")
    assert 'nan = "zero" of the stream' in line
    with pytest.raises(DataError, match=r"a_brain-mr.nii.gz: found 192 voxels that are NaN"):
        open_store(site.folder, {"brain-mr": STREAM})
    store = open_store(site.folder, {"brain-mr": ZERO})
    assert np.isfinite(store.images["brain-mr"]).all()
    assert not store.images["brain-mr"][0, 0, :3].any()
    run = tmp_path / "run.toml"
    text = 'spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 8], patch = [4, 4, 4], nan = "zero"'
    run.write_text(f'name = "run"\n[streams]\nbrain-mr = {{ {text} }}\n')
    assert site.check("--run", str(run)).exit_code == 0


@pytest.mark.parametrize("modality", [Modality.MR, Modality.CT, Modality.PET])
def test_nan_comes_out_as_zero_and_counts_for_no_percentile(modality):
    voxels = brain(np.nan)
    scaled = apply_intensity(voxels, modality, nan_to_zero=True)
    np.testing.assert_array_equal(scaled[3:], apply_intensity(voxels[3:], modality))
    assert not scaled[:3].any()
    assert not apply_intensity(np.full((2, 2), np.nan), modality, nan_to_zero=True).any()


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e39])
def test_infinity_is_never_background(site, value):
    site.add("a", voxels=brain(value, np.float64))
    site.assert_one_fault("192 voxels that are NaN or infinite, expected finite voxels")
    with pytest.raises(DataError, match=r"192 voxels that are NaN or infinite, expected finite voxels$"):
        read_image(site.folder / "a_brain-mr.nii.gz", "brain-mr", ZERO)


def test_nothing_but_nan_is_a_fault(site, tmp_path):
    site.add("a", voxels=np.full((8, 8, 8), np.nan, np.float32))
    site.assert_one_fault("512 voxels that are NaN or infinite")


def test_the_slope_of_a_header_may_not_make_infinity(site):
    site.write()
    image = nib.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4))
    image.header.set_slope_inter(1e37, 0.0)
    image.header["scl_slope"] = 1e37
    nib.save(image, site.folder / "a_brain-mr.nii.gz")
    site.row("a")
    raw = bytearray(nib.load(site.folder / "a_brain-mr.nii.gz").to_bytes())
    np.frombuffer(raw, np.float32, 1, 112)[:] = 3e38
    (site.folder / "a.nii").write_bytes(raw)
    site.lines = []
    site.row("a", path="a.nii")
    site.assert_one_fault("voxels that are NaN or infinite")


def test_an_output_that_is_not_finite_is_refused_with_the_file_named(site, monkeypatch):
    site.add("a")
    broken = np.full((1, 8, 8, 8), np.nan, np.float32)
    monkeypatch.setattr("panfm.data.read.prepare_volume", lambda *_: broken)
    with pytest.raises(DataError, match=r"a_brain-mr.nii.gz: found an image that does not come out finite"):
        open_store(site.folder, {"brain-mr": STREAM})
