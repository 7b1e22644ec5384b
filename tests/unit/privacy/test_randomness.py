"""Noise has the right spread, is found wrong if that is 2 % off, and is never the same twice."""

import math

import mpmath
import numpy as np
import pytest
import torch

from panfm.privacy import randomness
from panfm.privacy.randomness import normal, poisson_sample, secret_generator, uniform, with_noise

MILLION = 1_000_000


def has_deviation(values, expected):
    """To half a percent: ten standard errors of two million coordinates."""
    return abs(values.std().item() / expected - 1.0) < 0.005


def test_normal_has_the_stated_deviation_and_the_test_would_see_two_percent():
    values = normal(2 * MILLION)
    assert values.dtype == torch.float64
    assert has_deviation(values, 1.0)
    assert not has_deviation(1.02 * values, 1.0)
    assert not has_deviation(0.98 * values, 1.0)
    assert abs(values.mean().item()) < 0.005
    for bound in (1.0, 2.0, 3.0):
        inside, expected = (values.abs() < bound).double().mean().item(), math.erf(bound / math.sqrt(2))
        assert abs(inside - expected) < 6 * math.sqrt(expected * (1 - expected) / len(values))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: normal(1000),
        lambda: uniform(1000),
        lambda: with_noise(torch.zeros(1000, dtype=torch.float64), 1.0),
        lambda: torch.from_numpy(poisson_sample(np.arange(1000), 0.5)),
        lambda: torch.rand(1000, generator=secret_generator()),
    ],
)
def test_no_seed_decides_what_is_drawn(draw):
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        before = torch.random.get_rng_state()
        drawn.append(draw())
        assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("byte", [0, 127, 255])
def test_the_ends_of_the_range_are_finite(monkeypatch, byte):
    monkeypatch.setattr(randomness, "random_bytes", lambda size: bytearray([byte]) * size)
    assert 0.0 < uniform(3)[0] < 1.0
    assert torch.isfinite(normal(3)).all()


def test_every_number_comes_from_eight_fresh_bytes(monkeypatch):
    asked = []
    monkeypatch.setattr(randomness, "random_bytes", lambda size: asked.append(size) or bytearray(b"\x5a" * size))
    normal(10)
    assert asked == [8 * 10]
    assert normal(0).shape == uniform(0).shape == (0,)


def test_random_bytes_are_those_of_chacha20(monkeypatch):
    """Test vector 1 of RFC 8439, appendix A.1: the key stream under a key, nonce and counter of zeros."""
    monkeypatch.setattr(randomness.os, "urandom", bytes)
    assert randomness.random_bytes(64).hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


def test_every_draw_has_a_key_of_its_own_from_the_operating_system(monkeypatch):
    keys, real = [], randomness.os.urandom
    monkeypatch.setattr(randomness.os, "urandom", lambda size: keys.append(real(size)) or keys[-1])
    for draw in (uniform, normal):
        for _ in range(2):
            draw(1000)
    assert {len(key) for key in keys} == {32}
    assert len(keys) == len({*keys}) >= 4


def test_numbers_of_the_tail_get_as_many_bits_as_others(monkeypatch):
    """Seven leading zero bytes leave 8 bits of 63: the rest is drawn again, or a large number had 2^8 values only."""
    real = randomness.random_bytes

    def random_bytes(size):
        words = np.frombuffer(real(size), dtype=np.int64).copy()
        if first:
            words &= np.int64(0xFF) | np.int64(-(2**63))
            first.clear()
        return bytearray(words.tobytes())

    first = [True]
    monkeypatch.setattr(randomness, "random_bytes", random_bytes)
    values = normal(10_000)
    assert len(values.unique()) == 10_000
    assert (values.abs() > 8.0).all()
    assert (values > 0).double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_quantiles_are_the_true_ones():
    """Newton's step from the quantile found to the true one, in 40 digits, over the whole range that can come up."""
    mpmath.mp.dps = 40
    random = np.random.default_rng(0)
    tails = np.concatenate([random.uniform(0.5, 1.0, 8) * 2.0**-exponent for exponent in range(1, 118)])
    found = torch.special.ndtri(torch.from_numpy(tails)).tolist()
    for tail, value in zip(tails.tolist(), found, strict=True):
        error = (mpmath.erfc(-mpmath.mpf(value) / mpmath.sqrt(2)) / 2 - mpmath.mpf(tail)) / mpmath.npdf(value)
        assert abs(error) < 4e-15


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
    grid = 2.0 ** (np.floor(np.log2(deviation)) - 8)
    for start in (0.0, 1 / 3):
        found = with_noise(torch.full((1000, 200), start, dtype=torch.float64), deviation)
        assert torch.equal(found, (found / grid).round() * grid)
        assert (found - start).std().item() == pytest.approx(deviation, rel=0.01)


def fits_rounded_noise(found, start, deviation, grid):
    """Chi-square of the counts on the grid points against a rounded Gaussian about `start`, at six sigma."""
    points, counts = np.unique((found / grid).round().numpy().astype(np.int64), return_counts=True)
    edges = (np.arange(points[0], points[-1] + 2) - 0.5) * grid
    expected = len(found) * np.diff(torch.special.ndtr(torch.from_numpy((edges - start) / deviation)).numpy())
    seen = np.zeros(len(expected))
    seen[points - points[0]] = counts
    large = expected >= 20
    distance = ((seen - expected)[large] ** 2 / expected[large]).sum()
    return abs(distance - large.sum()) < 6 * np.sqrt(2 * large.sum())


@pytest.mark.parametrize("start", [0.0, 1 / 3])
def test_grid_points_come_up_as_those_of_an_exact_rounded_gaussian(start):
    deviation, grid = 1.5, 2.0**-8
    found = with_noise(torch.full((3 * MILLION,), start, dtype=torch.float64), deviation)
    assert fits_rounded_noise(found, start, deviation, grid)
    assert not fits_rounded_noise(found, start, 1.02 * deviation, grid)
    assert not fits_rounded_noise(found, start + 0.04, deviation, grid)
