"""Schedules at hand-computed positions."""

import pytest

from panfm.training.schedules import cosine, warmup_cosine


@pytest.mark.parametrize(("position", "factor"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0)])
def test_warmup_cosine(position, factor):
    assert warmup_cosine(position, warmup=0.1) == pytest.approx(factor)


def test_no_warmup_starts_at_the_top():
    assert warmup_cosine(0.0, warmup=0.0) == 1.0


@pytest.mark.parametrize(("position", "value"), [(0.0, 0.99), (0.5, 0.9945), (1.0, 0.999), (2.0, 0.999)])
def test_cosine(position, value):
    assert cosine(position, start=0.99, end=0.999) == pytest.approx(value)
