"""Robust means against slow references, and against updates that are far off."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.errors import ProtocolError
from panfm.registry import MEANS
from strategies.group_means import GroupSetup, coordinate_median, geometric_median, trimmed_mean

FOUR = [np.array(row, np.float32) for row in ([1, 2], [2, 4], [3, 6], [50, -50])]


def draw(num: int, size: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(num, size)).astype(np.float32))


def test_by_hand():
    assert coordinate_median(FOUR).tolist() == [2.5, 3.0]
    assert trimmed_mean(FOUR, [1, 1, 3, 1], trim=0.2).tolist() == [(2 + 3 * 3) / 4, (2 + 4) / 2]
    assert geometric_median([FOUR[0]] * 3 + [FOUR[3]], [1, 1, 1, 1]) == pytest.approx(FOUR[0], abs=1e-3)


@given(num=st.integers(1, 9), size=st.sampled_from([1, 7, 20_000]), seed=st.integers(0, 99))
def test_median_and_trimmed_mean_number_by_number(num, size, seed):
    updates = draw(num, size, seed)
    weights = np.random.default_rng(seed).integers(1, 5, num)
    places = np.random.default_rng(seed).integers(0, size, 5)
    median, trimmed = coordinate_median(updates), trimmed_mean(updates, weights, trim=0.25)
    assert median.shape == trimmed.shape == (size,)
    assert median.dtype == trimmed.dtype == np.float32
    cut = min(-(-num // 4), (num - 1) // 2)
    for place in places:
        pairs = sorted((float(update[place]), int(weight)) for update, weight in zip(updates, weights, strict=True))
        kept = pairs[cut : num - cut]
        assert median[place] == pytest.approx(np.median([value for value, _ in pairs]), abs=1e-7)
        expected = sum(value * weight for value, weight in kept) / sum(weight for _, weight in kept)
        assert trimmed[place] == pytest.approx(expected, abs=1e-6)


@given(num=st.integers(3, 7), seed=st.integers(0, 99))
def test_no_step_from_the_geometric_median_is_shorter(num, seed):
    updates, weights = draw(num, 3, seed), np.random.default_rng(seed).uniform(0.5, 2.0, num)

    def cost(z: np.ndarray) -> float:
        return sum(w * np.linalg.norm(z - u) for w, u in zip(weights, updates, strict=True))

    found = geometric_median(updates, weights).astype(float)
    around = found + 0.01 * np.random.default_rng(seed).normal(size=(50, 3))
    assert all(cost(found) <= cost(z) * 1.001 for z in around)


@pytest.mark.parametrize("far", [1e3, -1e6])
def test_one_of_five_cannot_carry_it_away(far):
    honest = draw(4, 100, seed=1)
    updates = [*honest, np.full(100, far, np.float32)]
    low, high = np.min(honest, axis=0), np.max(honest, axis=0)
    for found in (coordinate_median(updates), trimmed_mean(updates, [1] * 5, trim=0.2)):
        assert (found >= low).all()
        assert (found <= high).all()
    assert np.linalg.norm(geometric_median(updates, [1] * 5) - np.mean(honest, axis=0)) < 20
    assert np.linalg.norm(np.mean(updates, axis=0)) > 1000  # the plain mean is carried away


def test_edges():
    alone, nothing = [FOUR[0]], [np.zeros(0, np.float32)] * 3
    for updates in (alone, [FOUR[0]] * 4):
        weights = [2.0] * len(updates)
        assert coordinate_median(updates).tolist() == [1, 2]
        assert trimmed_mean(updates, weights, trim=0.4).tolist() == [1, 2]
        assert geometric_median(updates, weights).tolist() == [1, 2]
    assert coordinate_median(nothing).shape == trimmed_mean(nothing, [1] * 3, trim=0.2).shape == (0,)
    assert geometric_median(nothing, [1] * 3).shape == (0,)


def buffered(kind: str, *contributions, segments=((2, 0),)) -> np.ndarray | None:
    built = MEANS.load(kind)(GroupSetup(segments, 10.0, trim=0.2))
    for update, weights in contributions:
        built.add(np.asarray(update, np.float32), weights)
    return built.mean()


@pytest.mark.parametrize("kind", ["median", "trimmed", "geometric-median"])
def test_the_order_of_arrival_does_not_matter(kind):
    sent = [(update, (float(weight),)) for update, weight in zip([*FOUR, FOUR[0]], (1, 2, 3, 1, 1), strict=True)]
    for shift in range(5):
        assert buffered(kind, *sent[shift:], *sent[:shift]).tobytes() == buffered(kind, *sent).tobytes()


def test_the_kinds_are_told_apart():
    sent = [(update, (1.0,)) for update in FOUR]
    assert buffered("median", *sent).tolist() == coordinate_median(FOUR).tolist()
    assert buffered("trimmed", *sent).tolist() == trimmed_mean(FOUR, [1.0] * 4, trim=0.2).tolist()
    assert buffered("geometric-median", *sent) == pytest.approx(geometric_median(FOUR, [1.0] * 4))


def test_who_has_no_weight_has_no_vote():
    assert buffered("median", ([1, 2], (0.0,))) is None
    assert buffered("median") is None
    sent = [([1, 10], (1.0, 1.0)), ([2, 20], (1.0, 0.0)), ([3, 30], (1.0, 0.0))]
    assert buffered("median", *sent, segments=((1, 0), (1, 1))).tolist() == [2, 10]
    nobody = buffered("median", *[(update, (1.0, 0.0)) for update, _ in sent], segments=((1, 0), (1, 1)))
    assert np.signbit(nobody).tolist() == [False, True]


def test_what_is_wrong_is_refused():
    with pytest.raises(ProtocolError, match="holds NaN"):
        buffered("median", ([1, np.nan], (1.0,)))
