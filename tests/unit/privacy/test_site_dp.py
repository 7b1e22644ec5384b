"""Site-level privacy: a site's whole update has one norm, and the noise on the mean is the stated one."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from panfm.privacy.mechanisms import Mechanism, epsilon
from strategies.site_dp_mean import clip_update, noised_mean

MILLION = 1_000_000


def norm(updates):
    return float(np.sqrt(sum(np.square(update.astype(np.float64)).sum() for update in updates.values())))


def test_by_hand():
    update = {"backbone": np.array([3.0, 0.0], np.float32), "head": np.array([4.0], np.float32)}
    found = clip_update(update, 1.0)
    np.testing.assert_allclose(found["backbone"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(found["head"], [0.8], rtol=1e-6)
    assert all(np.array_equal(kept, update[group]) for group, kept in clip_update(update, 5.0).items())


@given(st.integers(0, 1000), st.floats(-18, 18), st.sampled_from([1e-3, 1.0, 64.0]))
def test_the_norm_is_bounded_over_all_groups(seed, magnitude, clip_norm):
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 2000, 3)
    update = {f"g{size}": (10.0**magnitude * random.normal(size=size)).astype(np.float32) for size in sizes}
    found = clip_update(update, clip_norm)
    assert norm(found) <= clip_norm * (1 + 1e-6)
    assert norm(found) == pytest.approx(min(norm(update), clip_norm), rel=1e-5)
    assert all(kept.dtype == np.float32 for kept in found.values())


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_counts_as_zero(poison):
    update = {"backbone": np.ones(3, np.float32), "head": np.array([poison, 1.0], np.float32)}
    assert not any(kept.any() for kept in clip_update(update, 1.0).values())
    assert not clip_update({"head": np.zeros(2, np.float32)}, 1.0)["head"].any()


def test_a_factor_that_float32_cannot_hold_lets_nothing_past_the_bound():
    """It would be rounded up from 0.75 to 1 of the least number there is."""
    update = {"backbone": np.full(10_000, 3e38, np.float32)}
    assert norm(clip_update(update, 3.2e-5)) <= 3.2e-5 * (1 + 1e-6)
    assert norm(clip_update(update, 500.0)) == pytest.approx(500.0, rel=1e-6)


def test_the_noise_is_the_stated_one_and_two_percent_would_show():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(noised_mean(np.zeros(MILLION, np.float32), 5, clip_norm=0.5, noise=2.0))
    assert not np.array_equal(*drawn)
    deviation = drawn[0].astype(np.float64).std()
    assert drawn[0].dtype == np.float32
    assert deviation == pytest.approx(0.2, rel=0.005)
    assert deviation != pytest.approx(0.98 * 0.2, rel=0.005)
    assert deviation != pytest.approx(1.02 * 0.2, rel=0.005)


def delta_of(epsilon, mu):
    """Of full Gaussian releases with sqrt(T) / z = mu, in closed form (Balle & Wang 2018)."""
    below, above = (NormalDist().cdf(-epsilon / mu + sign * mu / 2) for sign in (1, -1))
    return below - math.exp(epsilon) * above


def test_fifty_rounds_cost_what_the_closed_form_says():
    """The accountant lies 0.01 above it, never below."""
    found = epsilon([Mechanism("site updates", (), 1.0, 5.0, 1.0, 50)], 1e-3)
    mu = math.sqrt(50) / 5.0
    assert delta_of(found, mu) <= 1e-3 < delta_of(found - 0.02, mu)
