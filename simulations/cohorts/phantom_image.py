"""One organ as a scanner gives it: an ellipsoid with a mean, a gradient and a texture, in noise.

Intensity in the scanner's range [0, 1], with u the position in half views (-1 to 1 across the organ's view):

    I(u) = surroundings + amplitude * inside(u) * (1 + MEAN mean + GRADIENT gradient u_S
                                                    + TEXTURE e^(texture/2) waves(u)) + voxel noise

Two corners of the view hold a bright and a dark vial of constant intensity, each just over 1 % of the
scan. They pin the 1st and 99th percentiles, so that the intensity rule for MR keeps how bright an organ is, and by how
much it outshines the others.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.cohorts.phantom_body import Organ

TOP = 1000
"""Stored value of full intensity."""
SURROUNDINGS = 0.15
_MEAN, _GRADIENT, _TEXTURE = 0.25, 0.25, 0.30
_SIZE, _ELONGATION, _FREQUENCY = 0.10, 0.12, 0.20
_EDGE = 6.0
"""Steepness of the organ's border."""
_JITTER = 0.04
"""Sd of the organ's position, in half views."""
_VIAL = 0.5
"""The vials reach from here to the corners, in half views."""


def render(
    organ: Organ, traits: NDArray[np.float64], amplitude: float, noise: float, rng: np.random.Generator
) -> NDArray[np.int16]:
    """Draw one image.

    Args:
        organ: its look and its scanner.
        traits: [T] in the order of `TRAITS`, each about standard normal.
        amplitude: contrast against the surroundings, share of the scanner's range.
        noise: sd of the voxel noise, share of the scanner's range.
        rng: position, texture phase and noise.

    Returns:
        int16 voxels, axes as the scanner stores them.
    """
    size, elongation, mean, texture, frequency, gradient = traits
    axes, inside = place(organ, _SIZE * size, _ELONGATION * elongation, rng)
    cycles = np.pi * organ.cycles * np.exp(_FREQUENCY * frequency)
    waves = [np.cos(cycles * axis + phase) for axis, phase in zip(axes, rng.uniform(0, 2 * np.pi, 3), strict=True)]
    content = 1.0 + _MEAN * mean + _GRADIENT * gradient * axes[2].astype(np.float32)
    content = content.astype(np.float32) + np.float32(_TEXTURE * np.exp(texture / 2)) * _outer_sum(waves)
    return stored(organ, SURROUNDINGS + np.float32(amplitude) * inside * content, noise, rng)


def place(
    organ: Organ, size: float, elongation: float, rng: np.random.Generator
) -> tuple[list[NDArray[np.float64]], NDArray[np.floating]]:
    """Draw where an organ lies.

    Args:
        organ: its look and its scanner.
        size: log of its radius over the organ's mean radius.
        elongation: log of its stretch along R; A and S shrink by half as much.
        rng: position.

    Returns:
        Positions of the voxels along R, A and S from the organ's middle, in half views, and how far each voxel
        [R, A, S] lies inside the organ, 0 to 1.
    """
    axes = [axis - shift for axis, shift in zip(_axes(organ), _JITTER * rng.standard_normal(3), strict=True)]
    radii = organ.radius * np.exp(size + elongation * np.array([1.0, -0.5, -0.5]))
    distance = np.sqrt(_outer_sum([(axis / radius) ** 2 for axis, radius in zip(axes, radii, strict=True)]))
    inside: NDArray[np.floating] = 1.0 / (1.0 + np.exp(_EDGE * (distance - 1.0)))
    return axes, inside


def stored(organ: Organ, image: NDArray[np.floating], noise: float, rng: np.random.Generator) -> NDArray[np.int16]:
    """Add noise of this sd and the vials to an image [R, A, S], and turn it into int16 voxels in the scanner's axes."""
    image += np.float32(noise) * rng.standard_normal(image.shape, dtype=np.float32)
    bright, dark = _vials(organ)
    image[bright], image[dark] = 1.0, 0.0
    voxels = np.rint(TOP * np.clip(image, 0.0, 1.0)).astype(np.int16)
    return np.ascontiguousarray(_orientations().apply_orientation(voxels, _from_ras(organ)))


@cache
def affine(organ: Organ) -> NDArray[np.float64]:
    """[4, 4], index of a stored voxel to millimetres in R, A, S; the middle of the scan is the origin."""
    scaling = np.diag([*organ.spacing_mm, 1.0])
    scaling[:3, 3] = -np.array(organ.spacing_mm) * (np.array(organ.size) - 1) / 2
    back = _orientations().inv_ornt_aff(_from_ras(organ), organ.size)
    return np.asarray(scaling @ back)


def _from_ras(organ: Organ) -> NDArray[np.float64]:
    """How to flip and swap axes from R, A, S to the scanner's."""
    ras = _orientations().axcodes2ornt("RAS")
    stored = _orientations().axcodes2ornt(organ.axcodes)
    return np.asarray(_orientations().ornt_transform(ras, stored))


def _orientations() -> Any:
    """Nibabel's functions that flip and swap axes; a mistake in a run description is told before it is imported."""
    from nibabel import orientations

    return orientations


def _axes(organ: Organ) -> list[NDArray[np.float64]]:
    """Positions of the voxels along R, A and S, in half views."""
    return [
        (np.arange(size, dtype=np.float64) - (size - 1) / 2) * spacing / (organ.view_mm / 2)
        for size, spacing in zip(organ.size, organ.spacing_mm, strict=True)
    ]


@cache
def _vials(organ: Organ) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Corners of the scan: the bright vial right, anterior and superior, the dark one opposite."""
    widths = [int((axis > _VIAL).sum()) for axis in _axes(organ)]
    return tuple(slice(-width, None) for width in widths), tuple(slice(width) for width in widths)


def _outer_sum(axes: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    r, a, s = (axis.astype(np.float32) for axis in axes)
    total: NDArray[np.float32] = r[:, None, None] + a[None, :, None] + s[None, None, :]
    return total
