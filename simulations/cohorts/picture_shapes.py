"""The shapes that every modality shows: one of six, at a random place, size, angle and stretch.

A shape is a signed distance (negative inside) in its own coordinates u, v, scaled to the area of the unit disc, so that
neither how much of the picture is covered nor the mean brightness tells the classes apart.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float64]

SIZE = 64
"""Pixels along each side of a picture."""
_PLACE = 0.15
"""Largest shift of the centre along each axis, in half pictures."""
_TURN = 0.5
"""Largest turn either way, in radians."""
_RADIUS = (0.38, 0.52)
"""Radius of the disc of equal area, in half pictures."""
_STRETCH = 0.15
"""Sd of the log of the stretch along the shape's own axis."""
_EDGE = 40.0
"""Steepness of the border, per half picture."""


def pixel_axes() -> tuple[Field, Field]:
    """Positions y (down) [SIZE, 1] and x (right) [1, SIZE] of the pixels, in half pictures."""
    axis: Field = (np.arange(SIZE, dtype=np.float64) - (SIZE - 1) / 2) / (SIZE / 2)
    return axis[:, None], axis[None, :]


def draw_mask(shape: str, rng: np.random.Generator) -> Field:
    """Share of each pixel that a shape covers [SIZE, SIZE], in a random pose."""
    shift, angle = rng.uniform(-_PLACE, _PLACE, size=2), rng.uniform(-_TURN, _TURN)
    radius, stretch = np.exp(rng.uniform(*np.log(_RADIUS))), np.exp(_STRETCH * rng.standard_normal())
    y, x = (axis - move for axis, move in zip(pixel_axes(), shift, strict=True))
    u = (np.cos(angle) * x + np.sin(angle) * y) / (radius * stretch)
    v = (np.cos(angle) * y - np.sin(angle) * x) / (radius / stretch)
    return 1.0 / (1.0 + np.exp(np.clip(_EDGE * radius * _distance(shape, u, v), -50.0, 50.0)))


def _distance(shape: str, u: Field, v: Field) -> Field:
    """Signed distance of a shape as large as the unit disc."""
    scale = _scale(shape)
    return SHAPES[shape](u * scale, v * scale) / scale


@cache
def _scale(shape: str) -> float:
    """Square root of the shape's area over the unit disc's."""
    axis = np.linspace(-2.0, 2.0, 801)
    inside = SHAPES[shape](axis[None, :], axis[:, None]) < 0.0
    return float(np.sqrt(inside.mean() * 16.0 / np.pi))


def _disc(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 1.0


def _ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - 0.8) - 0.25


def _bar(u: Field, v: Field) -> Field:
    return np.maximum(np.abs(u) - 1.3, np.abs(v) - 0.4)


def _cross(u: Field, v: Field) -> Field:
    return np.minimum(_bar(u, v), _bar(v, u))


def _triangle(u: Field, v: Field) -> Field:
    sides = [np.cos(angle) * u + np.sin(angle) * v for angle in 2.0 * np.pi / 3.0 * np.arange(3)]
    return np.maximum.reduce(sides) - 0.6


def _crescent(u: Field, v: Field) -> Field:
    return np.maximum(_disc(u, v), 0.8 - np.hypot(u - 0.5, v))


SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "disc": _disc,
    "ring": _ring,
    "bar": _bar,
    "cross": _cross,
    "triangle": _triangle,
    "crescent": _crescent,
}
"""Class -> its signed distance."""
