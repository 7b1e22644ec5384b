"""Masks are resampled to a stream's grid like their images, and predictions back to the scan's own grid."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from panfm.config import StreamConfig
from panfm.data.masks import _likeliest, mask_from_grid, mask_to_grid, read_mask
from panfm.data.read import prepare_volume
from panfm.data.readers import ImageError, Volume

FINE = StreamConfig(shape=(20, 20, 20), patch=(4, 4, 4), spacing_mm=(1.0, 1.0, 1.0))
PICTURE = StreamConfig(shape=(8, 8), patch=(4, 4))


def oblique() -> np.ndarray:
    """A turned and mirrored affine, voxels of 1 x 1.5 x 2 mm, axes S, L, A by their main direction."""
    angle = np.deg2rad(17.0)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    order = np.array([[0, -1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ order @ np.diag([1.0, 1.5, 2.0])
    affine[:3, 3] = [11.0, -7.0, 3.0]
    return affine


def blob(shape: tuple[int, ...], centre: tuple[float, ...], radius: float, sizes: tuple[float, ...]) -> np.ndarray:
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.linalg.norm((places - centre) * sizes, axis=-1) < radius


def one_hot(classes: np.ndarray, number: int) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.eye(number, dtype=np.float32)[classes], -1, 0))


def test_a_mask_goes_to_the_grid_and_back_under_an_oblique_affine():
    shape, sizes = (16, 12, 9), (1.0, 1.5, 2.0)
    mask = np.where(blob(shape, (6, 5, 4), 4.0, sizes), 3, 0)
    mask[blob(shape, (11, 8, 6), 2.5, sizes)] = 9
    image = Volume(np.zeros(shape, np.float32), oblique())
    grid = mask_to_grid(mask, image, (0, 3, 9), FINE)
    assert set(np.unique(grid)) == {0, 1, 2}
    back = np.array([0, 3, 9])[mask_from_grid(one_hot(grid, 3), image, FINE)]
    assert back.shape == mask.shape
    assert (back == mask).mean() > 0.97
    for value in (3, 9):
        assert (back[mask == value] == value).mean() > 0.8


def test_a_mask_lies_on_its_image_on_the_grid():
    """Voxels that the mask marks are those that are bright in the prepared image."""
    shape, sizes = (16, 12, 9), (1.0, 1.5, 2.0)
    mask = blob(shape, (6, 5, 4), 4.0, sizes)
    image = Volume(np.where(mask, 400.0, -200.0).astype(np.float32), oblique())
    prepared = prepare_volume(*image, "liver-ct", FINE)[0]
    grid = mask_to_grid(mask.astype(np.int64), image, (0, 1), FINE)
    assert (grid == (prepared > 0.5)).mean() > 0.999


def test_where_the_spacing_matches_a_round_trip_is_exact():
    random = np.random.default_rng(0)
    mask = random.integers(0, 3, (12, 17, 20))
    image = Volume(np.zeros(mask.shape, np.float32), np.diag([-1.0, 1.0, -1.0, 1.0]))
    back = mask_from_grid(one_hot(mask_to_grid(mask, image, (0, 1, 2), FINE), 3), image, FINE)
    assert np.array_equal(back, mask)


def test_outside_the_grid_is_background():
    image = Volume(np.zeros((30, 30, 30), np.float32), np.eye(4))
    back = mask_from_grid(one_hot(np.ones((20, 20, 20), int), 2), image, FINE)
    assert back[15, 15, 15] == 1
    assert back[0, 0, 0] == back[29, 15, 15] == 0


def test_pictures_go_there_and_back():
    mask = np.zeros((16, 24), np.int64)
    mask[4:12, 6:18] = 255
    picture = Image.new("L", (24, 16))
    grid = mask_to_grid(mask, picture, (0, 255), PICTURE)
    assert grid.shape == (8, 8)
    assert grid[2:6, 2:6].all()
    back = mask_from_grid(one_hot(grid, 2), picture, PICTURE)
    assert back.shape == (16, 24)
    assert ((back == 1) == (mask > 0)).mean() > 0.9


@pytest.fixture
def save(tmp_path):
    def write(voxels: np.ndarray, affine: np.ndarray):
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "mask.nii.gz")
        return tmp_path / "mask.nii.gz"

    return write


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda mask: (mask[:3], np.eye(4)), "shape 3x5x6"),
        (lambda mask: (mask, np.diag([1.0, 1, 2, 1])), "another place"),
        (lambda mask: (mask, np.diag([1.0, 1, 1.03, 1])), "another place"),  # 0.15 mm at the far corner
        (lambda mask: (mask + 0.5, np.eye(4)), "holds 0.5, expected whole numbers"),
        (lambda mask: (mask - 1.0, np.eye(4)), "holds -1, expected whole numbers"),
    ],
)
def test_a_mask_that_is_none_is_refused(save, change, told):
    image = Volume(np.zeros((4, 5, 6), np.float32), np.eye(4))
    with pytest.raises(ImageError, match=told):
        read_mask(save(*change(np.zeros((4, 5, 6), np.float32))), image)


def test_a_mask_may_lie_a_rounding_error_apart(save):
    image = Volume(np.zeros((4, 5, 6), np.float32), np.diag([1.0, 1, 1, 1]))
    assert not read_mask(save(np.zeros((4, 5, 6), np.uint8), np.diag([1.0, 1, 1.001, 1])), image).any()


def test_modes_of_pictures(tmp_path):
    picture, numbers = Image.new("RGB", (5, 4)), np.arange(20, dtype=np.uint8).reshape(4, 5)
    palette = Image.new("P", (5, 4))
    palette.putdata(numbers.flatten().tolist())
    palette.putpalette([value for one in range(256) for value in (255 - one, one, 0)])
    for number, mask in enumerate((Image.fromarray(numbers), palette, Image.fromarray(np.stack([numbers] * 3, -1)))):
        mask.save(tmp_path / f"{number}.png")
        assert np.array_equal(read_mask(tmp_path / f"{number}.png", picture), numbers)
    Image.fromarray(np.stack([numbers, numbers, 255 - numbers], -1)).save(tmp_path / "colour.png")
    with pytest.raises(ImageError, match="in colours"):
        read_mask(tmp_path / "colour.png", picture)
    with pytest.raises(ImageError, match="shape 5x4, expected 4x5"):
        read_mask(tmp_path / "0.png", picture.rotate(90, expand=True))


def test_a_mask_as_jpeg_is_refused_under_any_name(tmp_path):
    image = Image.fromarray(np.zeros((8, 8), np.uint8))
    image.save(tmp_path / "mask.png", format="JPEG")
    with pytest.raises(ImageError, match="a mask as JPEG"):
        read_mask(tmp_path / "mask.png", image)


def test_the_likeliest_class_is_that_of_argmax():
    maps = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.float32)  # with equal ones
    assert np.array_equal(_likeliest(iter(maps)), maps.argmax(axis=0))
