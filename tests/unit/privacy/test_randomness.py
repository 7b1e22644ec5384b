"""Noise from the operating system: the right spread, found wrong if it is 2 % off, and never the same twice."""

import numpy as np
import pytest
import torch

from panfm.privacy import randomness
from panfm.privacy.randomness import normal, poisson_sample, uniform, with_noise

MILLION = 1_000_000


def has_deviation(values, expected):
    """To half a percent: seven standard errors of a million coordinates."""
    return abs(values.std().item() / expected - 1.0) < 0.005


def test_normal_has_the_stated_deviation_and_the_test_would_see_two_percent():
    values = normal(MILLION)
    assert values.dtype == torch.float64
    assert has_deviation(values, 1.0)
    assert not has_deviation(1.02 * values, 1.0)
    assert not has_deviation(0.98 * values, 1.0)
    assert abs(values.mean().item()) < 0.005
    inside = [(values.abs() < bound).double().mean().item() for bound in (1.0, 2.0, 3.0)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.002)


def test_no_seed_decides_the_noise():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        drawn.append(normal(1000))
        assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("byte", [0, 255])
def test_the_ends_of_the_range_are_finite(monkeypatch, byte):
    monkeypatch.setattr(randomness.os, "urandom", lambda size: bytes([byte]) * size)
    assert 0.0 < uniform(3)[0] < 1.0
    assert torch.isfinite(normal(3)).all()


def test_bits_of_all_words_are_used(monkeypatch):
    """Every uniform number comes from eight fresh bytes."""
    asked = []
    real = randomness.os.urandom
    monkeypatch.setattr(randomness.os, "urandom", lambda size: asked.append(size) or real(size))
    normal(10)
    assert asked == [8 * 10]
    assert normal(0).shape == uniform(0).shape == (0,)


def test_a_poisson_sample_takes_each_with_the_rate():
    indices = np.arange(100, 100_100)
    drawn = poisson_sample(indices, 0.3)
    assert abs(len(drawn) - 30_000) < 6 * np.sqrt(100_000 * 0.3 * 0.7)
    assert np.isin(drawn, indices).all()
    assert (np.diff(drawn) > 0).all()
    assert len(poisson_sample(np.arange(0), 0.5)) == 0
    assert len(poisson_sample(np.arange(9), 1.0)) == 9
    sizes = {len(poisson_sample(np.arange(100), 0.5)) for _ in range(20)}
    assert len(sizes) > 1


@pytest.mark.parametrize("deviation", [3.0, 0.01])
def test_what_is_noised_lies_on_one_grid_whatever_it_was(deviation):
    grid = 2.0 ** (np.floor(np.log2(deviation)) - 20)
    for start in (0.0, 1 / 3):
        found = with_noise(torch.full((1000, 200), start, dtype=torch.float64), deviation)
        assert torch.equal(found, (found / grid).round() * grid)
        assert (found - start).std().item() == pytest.approx(deviation, rel=0.01)
        assert len(found.unique()) > 190_000 * 0.9
