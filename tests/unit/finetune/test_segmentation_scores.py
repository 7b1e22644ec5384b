"""Dice and the 95 % Hausdorff distance equal numbers worked out by hand, and those of MONAI."""

import math

import numpy as np
import pytest

from panfm.finetune.segmentation_scores import dice, hausdorff_95


def box(*ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((12, 12, 12), bool)
    mask[tuple(slice(*one) for one in ranges)] = True
    return mask


def test_by_hand():
    here, there = box((2, 6), (2, 6), (2, 6)), box((4, 8), (2, 6), (2, 6))
    assert dice(here, there) == pytest.approx(0.5)
    assert hausdorff_95(here, there, (1.5, 1.0, 1.0)) == pytest.approx(3.0)
    assert dice(here, here) == 1.0
    assert hausdorff_95(here, here, (1, 1, 1)) == 0.0


def test_what_is_not_there():
    empty, full = box((0, 0)), box((2, 6))
    assert math.isnan(dice(empty, empty))
    assert dice(empty, full) == 0.0
    assert math.isnan(hausdorff_95(empty, full, (1, 1, 1)))
    assert math.isnan(hausdorff_95(full, empty, (1, 1, 1)))


def test_distances_do_not_depend_on_the_empty_space_around():
    random = np.random.default_rng(0)
    here, there = (random.random((5, 4, 3)) < 0.5 for _ in range(2))
    around = [np.pad(mask, ((3, 2), (0, 5), (4, 1))) for mask in (here, there)]
    assert hausdorff_95(*around, (2.0, 1.0, 0.5)) == hausdorff_95(here, there, (2.0, 1.0, 0.5))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_as_monai_has_them():
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance

    random = np.random.default_rng(0)
    for _ in range(3):
        start = random.integers(1, 4, (2, 3))
        ends = start + random.integers(3, 8, (2, 3))
        here, there = (box(*zip(low, high, strict=True)) for low, high in zip(start, ends, strict=True))
        there &= random.random(there.shape) < 0.9
        tensors = [torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (here, there)]
        assert dice(here, there) == pytest.approx(compute_dice(*tensors).item(), abs=1e-6)
        expected = compute_hausdorff_distance(*tensors, percentile=95, spacing=[1.0, 2.0, 0.5]).item()
        assert hausdorff_95(here, there, (1.0, 2.0, 0.5)) == pytest.approx(expected, abs=1e-5)
