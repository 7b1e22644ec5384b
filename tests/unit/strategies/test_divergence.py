import numpy as np
import pytest

from panfm.errors import ProtocolError
from strategies.group_means import GroupSetup, LayerwiseMean

START = np.array([1, 0, 2, 2, 0, 0], np.float32)
LAYERS = ((2, 0), (2, 0), (2, 0))


def mean(*contributions: tuple[list[float], float], layers=LAYERS) -> LayerwiseMean:
    built = LayerwiseMean(GroupSetup(((6, 0),), 100.0, layers=layers, start=START))
    for update, weight in contributions:
        built.add(np.array(update, np.float32), (weight,))
    return built


def test_by_hand():
    """Layer 1: cosines sqrt(1/2) and 1; layer 2: 1 and 0, turned about; layer 3 has no direction: 1 and 1."""
    found = mean(([0, 1, 1, 1, 4, 0], 3.0), ([1, 0, -3, -3, 0, 2], 2.0)).mean()
    half = 3 * 0.5**0.5
    expected = [2 / (half + 2), half / (half + 2), 1, 1, 3 * 4 / 5, 2 * 2 / 5]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sites_that_turn_alike_weigh_as_ever():
    found = mean(([0.5, 0, 0, 0, 0, 0], 3.0), ([0.5, 0, 1, 1, 0, 0], 1.0)).mean()
    np.testing.assert_allclose(found, [0.5, 0, 0.25, 0.25, 0, 0], rtol=1e-6)


def test_order_does_not_matter():
    random = np.random.default_rng(0)
    sent = [(random.normal(size=6).tolist(), float(weight)) for weight in (1, 7, 20)]
    assert mean(*sent).mean().tobytes() == mean(*reversed(sent)).mean().tobytes()


def test_where_nobody_counts_is_minus_zero():
    assert mean(([1] * 6, 0.0)).mean() is None
    found = mean(([-1, 0, -4, -4, 1, 1], 1.0)).mean()
    assert np.signbit(found[2:4]).all()
    assert not found[2:4].any()


def test_what_is_wrong_is_refused():
    built = mean()
    for update, weights, why in (
        (np.full(6, np.nan, np.float32), (1.0,), "holds NaN"),
        (np.full(6, np.inf, np.float32), (1.0,), "holds NaN, infinity"),
        (np.full(6, 3e38, np.float32), (1.0,), "a number beyond 64"),
        (np.zeros(5, np.float32), (1.0,), r"\[5\]"),
        (np.zeros(6, np.float32), (1.0, 1.0), "2 weights, expected 1"),
        (np.zeros(6, np.float32), (101.0,), "weight 101"),
    ):
        with pytest.raises(ProtocolError, match=why):
            built.add(update, weights)
    assert built.mean() is None


def test_what_is_taken_off_never_came():
    built = mean(([0.5, 0, 1, 1, 0, 0], 3.0))
    extra = np.array([3, -2, 0, 1, 9, 1], np.float32)
    built.add(extra, (2.0,))
    built.remove(extra, (2.0,))
    assert built.mean().tobytes() == mean(([0.5, 0, 1, 1, 0, 0], 3.0)).mean().tobytes()
