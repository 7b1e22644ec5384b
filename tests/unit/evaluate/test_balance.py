import numpy as np
import pytest

from panfm.evaluate.representation import saliency_entropy
from panfm.training.monitors import effective_rank


def test_effective_rank_by_hand():
    orthogonal = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert effective_rank(orthogonal) == pytest.approx(2.0)
    assert effective_rank(orthogonal[:, :1] @ np.ones((1, 5)) + 3) == pytest.approx(1.0)


def test_effective_rank_of_white_noise_is_nearly_full():
    assert 9.5 < effective_rank(np.random.default_rng(0).normal(size=(2000, 10))) <= 10


@pytest.mark.parametrize("features", [np.full((5, 3), 0.1), np.zeros((4, 2)), np.ones((1, 3))])
def test_effective_rank_of_a_constant_is_zero(features):
    assert effective_rank(features) == 0.0


def test_saliency_entropy_by_hand():
    assert saliency_entropy([0.25] * 4) == pytest.approx(1.0)
    assert saliency_entropy([1.0, 0.0]) == 0.0
    assert saliency_entropy([2.0, 2.0, 0.0, 0.0]) == pytest.approx(0.5)
    assert saliency_entropy([1.0]) == 1.0
