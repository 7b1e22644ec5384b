import itertools

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from panfm.anatomy import Modality
from panfm.config import StreamConfig
from panfm.data.intensity import apply_intensity
from panfm.data.read import prepare_volume, read_image
from panfm.errors import DataError


def stream(shape, spacing):
    return StreamConfig(shape=shape, patch=shape, spacing_mm=spacing)


def noise(shape=(6, 7, 8)):
    return np.random.default_rng(0).uniform(-200, 400, shape)


def affine_of(axes, spacing):
    """Affine of an image stored along the given axes, e.g. ("L", "P", "S")."""
    positive = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, (axis, size) in enumerate(zip(axes, spacing, strict=True)):
        row, sign = positive[axis]
        affine[row, column] = sign * size
    return affine


ALL_AXES = [
    axes for pairs in itertools.permutations([("R", "L"), ("A", "P"), ("S", "I")]) for axes in itertools.product(*pairs)
]


@pytest.mark.parametrize("axes", ALL_AXES, ids="".join)
def test_all_48_orientations_end_in_ras(axes):
    ras = noise()
    spacing = {"R": 1.0, "A": 2.0, "S": 3.0}
    order = [{"L": "R", "P": "A", "I": "S"}.get(axis, axis) for axis in axes]
    stored = ras.transpose(["RAS".index(axis) for axis in order])
    stored = stored[tuple(slice(None, None, 1 if axis in "RAS" else -1) for axis in axes)]
    affine = affine_of(axes, [spacing[axis] for axis in order])
    prepared = prepare_volume(stored, affine, "liver-ct", stream((6, 7, 8), (1.0, 2.0, 3.0)))
    np.testing.assert_allclose(prepared[0], apply_intensity(ras, Modality.CT), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4, 4), (10, 10, 10), (3, 12, 8), (1, 1, 1)])
def test_same_spacing_crops_and_pads_about_the_centre(shape):
    voxels = noise()
    scaled = apply_intensity(voxels, Modality.CT)
    expected = np.zeros(shape, dtype=np.float32)
    for index in np.ndindex(shape):
        source = [i + (n - size) // 2 for i, n, size in zip(index, voxels.shape, shape, strict=True)]
        if all(0 <= i < n for i, n in zip(source, voxels.shape, strict=True)):
            expected[index] = scaled[tuple(source)]
    prepared = prepare_volume(voxels, np.eye(4), "liver-ct", stream(shape, (1.0, 1.0, 1.0)))
    np.testing.assert_allclose(prepared[0], expected, atol=1e-5)


def test_single_slice_stays_one_slice():
    voxels = noise((6, 7, 1))
    prepared = prepare_volume(voxels, np.eye(4), "liver-ct", stream((6, 7, 5), (1.0, 1.0, 1.0)))
    np.testing.assert_allclose(prepared[0, :, :, 2], apply_intensity(voxels, Modality.CT)[:, :, 0], atol=1e-5)
    np.testing.assert_allclose(prepared[0, :, :, [0, 1, 3, 4]], 0, atol=1e-5)


def test_finer_spacing_is_trilinear_about_the_centre():
    voxels = noise((5, 6, 7))
    scaled = np.pad(apply_intensity(voxels, Modality.CT).astype(np.float64), 1)  # 0 outside the scan
    spacing, shape = (0.5, 0.8, 1.0), (9, 7, 7)
    expected = np.zeros(shape)
    for index in np.ndindex(shape):
        where = [
            (n - 1) / 2 + s * (i - (m - 1) / 2) for i, n, m, s in zip(index, (5, 6, 7), shape, spacing, strict=True)
        ]
        for corner in itertools.product((0, 1), repeat=3):
            base = np.floor(where).astype(int)
            weight = np.prod([1 - abs(w - (b + c)) for w, b, c in zip(where, base, corner, strict=True)])
            expected[index] += weight * scaled[tuple(base + corner + 1)]
    prepared = prepare_volume(voxels, np.eye(4), "liver-ct", stream(shape, spacing))
    np.testing.assert_allclose(prepared[0], expected, atol=1e-5)


def test_coarser_spacing_keeps_a_ramp_and_averages_a_checkerboard():
    ramp = np.broadcast_to(np.linspace(-200, 400, 41)[:, None, None], (41, 9, 9))
    prepared = prepare_volume(ramp, np.eye(4), "liver-ct", stream((9, 1, 1), (4.0, 4.0, 4.0)))
    np.testing.assert_allclose(prepared[0, :, 0, 0], 0.5 + 0.1 * np.arange(-4, 5), atol=1e-4)
    board = np.indices((23, 23, 23)).sum(0) % 2 * 600.0 - 200.0
    prepared = prepare_volume(board, np.eye(4), "liver-ct", stream((5, 5, 5), (4.0, 4.0, 4.0)))
    np.testing.assert_allclose(prepared, 0.5, atol=0.02)


def test_oblique_scan_keeps_its_voxel_size():
    angle = np.deg2rad(20)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-2.0, 2.0, 3.0])
    voxels = noise()
    prepared = prepare_volume(voxels, affine, "liver-ct", stream((6, 7, 8), (2.0, 2.0, 3.0)))
    np.testing.assert_allclose(prepared[0], apply_intensity(voxels, Modality.CT)[::-1], atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_file_equals_memory_to_the_bit(tmp_path, dtype, kind, suffix):
    voxels = np.random.default_rng(1).integers(0, 200, (9, 8, 7)).astype(dtype)
    affine = affine_of("LPS", (1.7, 2.3, 3.1))
    image = kind(voxels, None)
    image.header.set_sform(affine, code=1)
    image.header.set_zooms((1.7, 2.3, 3.1))
    nib.save(image, tmp_path / f"scan{suffix}")
    config = stream((6, 6, 6), (2.5, 2.5, 2.5))
    read = read_image(tmp_path / f"scan{suffix}", "brain-mr", config)
    assert read.dtype == np.float32
    assert read.shape == (1, 6, 6, 6)
    assert read.flags.c_contiguous
    assert (read == prepare_volume(voxels, affine, "brain-mr", config)).all()


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(np.array([[[0, 100]]], dtype=np.int16), None)
    image.header.set_sform(np.eye(4), code=1)
    image.header.set_slope_inter(6.0, -200.0)
    nib.save(image, tmp_path / "scan.nii.gz")
    read = read_image(tmp_path / "scan.nii.gz", "liver-ct", stream((1, 1, 2), (1.0, 1.0, 1.0)))
    np.testing.assert_allclose(read.ravel(), [0, 1], atol=1e-6)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (1, "RGB"), (1, "P"), (3, "RGB"), (3, "RGBA"), (3, "L")])
def test_picture(tmp_path, channels, mode):
    Image.new("RGB", (30, 20), (51, 51, 51)).convert(mode).save(tmp_path / "chest.png")
    config = StreamConfig(shape=(8, 12), patch=(4, 4), channels=channels)
    read = read_image(tmp_path / "chest.png", "chest-xray", config)
    assert read.shape == (channels, 8, 12)
    np.testing.assert_allclose(read, 0.2, atol=1e-6)


def test_picture_rows_are_height():
    config = StreamConfig(shape=(2, 4), patch=(1, 1))
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 4)
    from panfm.data.read import prepare_picture

    np.testing.assert_allclose(prepare_picture(Image.fromarray(pixels), config)[0] * 255, pixels, atol=1e-5)


def test_fault_names_the_file(tmp_path):
    config = stream((4, 4, 4), (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match=r"^/.*/none.nii.gz: found no such file, expected an image$"):
        read_image(tmp_path / "none.nii.gz", "brain-mr", config)
