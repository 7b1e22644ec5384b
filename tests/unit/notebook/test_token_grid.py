"""Where tokens lie in the space of a scan."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from panfm.config import StreamConfig
from panfm.data.read import prepare_volume
from panfm.notebook.token_grid import grid_affine


def stream(shape, patch, spacing):
    return StreamConfig(shape=shape, patch=patch, spacing_mm=spacing)


def test_the_centre_of_a_patch_by_hand():
    config = stream((8, 8, 8), (4, 4, 4), (2.0, 2.0, 2.0))
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-10.0, 20.0, 5.0)
    # 8 of 10 voxels are kept, from the second on; the first patch holds voxels 1 to 4, with its centre at 2.5
    expected = np.array([[8, 0, 0, -5.0], [0, 8, 0, 25.0], [0, 0, 8, 10.0], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(grid_affine((10, 10, 10), affine, config), expected, atol=1e-9)


AXES = [("R", "A", "S"), ("L", "P", "S"), ("P", "I", "R"), ("S", "L", "A")]


@pytest.mark.parametrize("codes", AXES, ids="".join)
@pytest.mark.parametrize(
    ("patch", "spacing"), [((6, 4, 5), (2.0, 2.0, 2.0)), ((12, 4, 4), (1.0, 2.0, 3.0)), ((6, 2, 5), (2.0, 4.0, 2.0))]
)
def test_a_bright_patch_is_found_where_the_scan_has_it(codes, patch, spacing):
    """Whatever the order and direction of the stored axes, and the size of voxels and patches."""
    config = stream(tuple(2 * size for size in patch), patch, spacing)
    ras = np.zeros((12, 8, 10), dtype=np.float32)
    centre = np.array([9, 2, 3])
    ras[tuple(slice(at - 1, at + 2) for at in centre)] = 1.0
    place = np.diag([2.0, 2.0, 2.0, 1.0])
    place[:3, 3] = (-7.0, 3.0, 11.0)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    stored = nib.orientations.apply_orientation(ras, turn)
    affine = place @ nib.orientations.inv_ornt_aff(turn, ras.shape)
    prepared = prepare_volume(stored, affine, "brain-mr", config)[0]
    sums = {
        index: prepared[tuple(slice(at * size, (at + 1) * size) for at, size in zip(index, patch, strict=True))].sum()
        for index in itertools.product(range(2), repeat=3)
    }
    to_mm = grid_affine(stored.shape, affine, config)
    centres = {index: (to_mm @ [*index, 1.0])[:3] for index in sums}
    wanted = (place @ [*centre, 1.0])[:3]
    brightest = max(sums, key=sums.get)
    half_a_patch = np.asarray(patch) * spacing / 2
    assert [index for index in sums if (np.abs(centres[index] - wanted) <= half_a_patch).all()] == [brightest]
