"""Caps on weights, and the streaming mean that keeps them."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest

from strategies.exact_mean import ExactMean
from strategies.group_means import _capped, trimmed_mean
from strategies.weight_caps import capped_shares, capped_weights, water_level


def test_by_hand():
    assert capped_weights([1.0, 1.0, 10.0], 0.5) == [1.0, 1.0, 2.0]
    assert capped_weights([1.0, 8.0, 9.0], 0.4) == pytest.approx([1.0, 2.0, 2.0])
    assert capped_weights([3.0, 5.0, 9.0], 1 / 3) == pytest.approx([3.0, 3.0, 3.0])
    assert capped_weights([1.0, 5.0, 0.0], 0.5) == [1.0, 5.0, 0.0]  # two contribute
    assert water_level([2.0, 2.0, 3.0], 0.5) is None
    assert capped_shares({"a": 1.0, "b": 1.0, "c": 98.0}, 0.5) == {"a": 0.25, "b": 0.25, "c": 0.5}
    assert capped_shares({"a": 0.0}, 0.5) == {"a": 0.0}


@pytest.mark.parametrize("max_share", [0.25, 0.4, 0.5, 1.0])
def test_numbers_by_numbers_as_one_by_one(max_share):
    weights = np.random.default_rng(0).lognormal(0.0, 2.0, (6, 50))
    found = _capped(weights, max_share)
    for number in range(50):
        np.testing.assert_allclose(found[:, number], capped_weights(weights[:, number], max_share), rtol=1e-9)


@pytest.mark.parametrize("max_share", [0.3, 0.5])
def test_the_mean_is_that_of_capped_weights_in_any_order(max_share):
    """Two weights: of the first three numbers, and of two; a row beyond the usual is summed apart."""
    random = np.random.default_rng(1)
    updates = [random.normal(0.0, 0.1, 5).astype(np.float32) for _ in range(4)]
    updates[2][1] = 7.0
    weights = [(20.0, 1.0), (9000.0, 1.0), (40.0, 0.0), (33.0, 500.0)]
    results = set()
    for order in permutations(range(4)):
        mean = ExactMean(((3, 0), (2, 1)), weight_limit=10_000, max_share=max_share)
        for index in order:
            mean.add(updates[index], weights[index])
        results.add(mean.mean().tobytes())
    assert len(results) == 1
    found = np.frombuffer(results.pop(), np.float32)
    for which, at in ((0, slice(0, 3)), (1, slice(3, 5))):
        lowered = capped_weights([weight[which] for weight in weights], max_share)
        expected = np.average([update[at] for update in updates], axis=0, weights=lowered)
        np.testing.assert_allclose(found[at], expected, rtol=1e-4, atol=1e-6)


def test_what_is_taken_off_leaves_what_may_have_to_be_capped():
    updates = [np.full(3, value, np.float32) for value in (0.1, -0.1, 0.2)]
    weights = [(1000.0,), (10.0,), (20.0,)]
    mean, other = (ExactMean(((3, 0),), weight_limit=1e6, max_share=0.5) for _ in range(2))
    for update, weight in zip(updates, weights, strict=True):
        mean.add(update, weight)
        other.add(update, weight)
        for size in (1.0, 1e5):
            other.add(-update, (size,))
            other.remove(-update, (size,))
    assert mean.mean().tobytes() == other.mean().tobytes()


@pytest.mark.parametrize(("weights", "copies"), [((50.0,) * 6, 0.1), ((10.0, 4000.0, 30.0, 5.0), 1.6)])
def test_one_contribution_is_kept_and_none_of_sites_that_weigh_alike(weights, copies):
    size = 1 << 18
    mean, update = ExactMean(((size, 0),), weight_limit=5000, max_share=0.5), np.full(size, 0.1, np.float32)
    mean.add(update, (1.0,))
    mean.remove(update, (1.0,))  # compiled
    tracemalloc.start()
    for weight in weights:
        mean.add(update, (weight,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= copies * update.nbytes


def test_what_is_left_of_a_trimmed_number_is_capped_too():
    updates = [np.array([value], np.float32) for value in (-1.0, 0.0, 1.0, 1.0, 5.0)]
    found = trimmed_mean(updates, [1.0, 1.0, 1e6, 1.0, 1.0], trim=0.2, max_share=0.5)
    assert found.tolist() == [pytest.approx(0.75)]
