"""One organ of the phantom `textured`: disease shows in the direction of a texture, not in its strength.

Intensity in the scanner's range [0, 1], with u the position in half views and f a texture of unit variance:

    I(u) = gain (SURROUNDINGS + amplitude * inside(u) * (1 + MEAN mean + GRADIENT gradient u_S
                                                           + TEXTURE e^(SPREAD texture) f(u))) + voxel noise
    f    = sqrt(w1) wave(R) + sqrt(1 - w1) wave(A) + sqrt(w2) wave(R + A) + sqrt(1 - w2) wave(R - A)
    w    = sigmoid(STEEPNESS code)

A wave is a cosine of one period along its direction. The organ has four lobules, its quadrants in the plane of R and A;
in each lobule each wave has a random phase, and leans along S by a random angle. Mean, spread and percentiles of voxels
and the mean gradient over axes say nothing of a code, since the two directions of a pair have the same power together
whatever w is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simulations.cohorts.phantom_body import Organ, unit_loadings
from simulations.cohorts.phantom_image import place, stored

CODES: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "brain": ({"neuro": 1.0}, {"cognitive": 1.0}),
    "heart": ({"cardiac": 1.0}, {"vascular": 1.0}),
    "adipose": ({"adiposity": 1.0}, {"metabolic": 1.0}),
    "liver": ({"hepatic": 1.0}, {"metabolic": 0.6, "hepatic": -0.5}),
    "kidney": ({"renal": 1.0}, {"renal": 0.5, "vascular": -0.6}),
    "spleen": ({"haematologic": 1.0}, {"hepatic": 1.0}),
    "pancreas": ({"pancreatic": 1.0}, {"pancreatic": 0.5, "metabolic": -0.6}),
}
"""Organ -> factors that its two codes show, with weights: of the pair R and A, and of the pair R + A and R - A."""

_SURROUNDINGS = 0.3
_MEAN, _GRADIENT, _TEXTURE, _SPREAD = 0.12, 0.2, 0.45, 0.05
_SIZE, _ELONGATION = 0.02, 0.02
_STEEPNESS = 2.6
_PERIOD, _FREQUENCY = 5 / 8, 0.06
"""Period of a wave in half views, and its log-sd over patients. 5/8 are 5 voxels of 16 across the view."""
_LEAN = 0.6
"""Sd of the radians along S per radian in the plane."""
_GAIN = 0.03
"""Sd of the scanner's log gain."""


def code_loadings(organ: str) -> NDArray[np.float64]:
    """[F, 2]: how much each code of an organ shows of each factor; every code has unit variance over patients."""
    return unit_loadings(CODES[organ])


def render_texture(
    organ: Organ,
    traits: NDArray[np.float64],
    codes: NDArray[np.float64],
    amplitude: float,
    noise: float,
    rng: np.random.Generator,
) -> NDArray[np.int16]:
    """Draw one image.

    Args:
        organ: its look and its scanner.
        traits: [T] in the order of `TRAITS`, each about standard normal.
        codes: [2] about standard normal.
        amplitude: contrast against the surroundings, share of the scanner's range.
        noise: sd of the voxel noise, share of the scanner's range.
        rng: gain, position, texture phases and noise.

    Returns:
        int16 voxels, axes as the scanner stores them.
    """
    size, elongation, mean, texture, frequency, gradient = traits
    gain = np.exp(_GAIN * rng.standard_normal())
    (r, a, s), inside = place(organ, _SIZE * size, _ELONGATION * elongation, rng)
    rate = 2 * np.pi / (_PERIOD * np.exp(_FREQUENCY * frequency))
    phases = rng.uniform(0, 2 * np.pi, (4, 2, 2))
    waves = directional_texture((rate * r, rate * a, rate * s), codes, phases, _LEAN * rng.standard_normal((4, 2, 2)))
    content = 1.0 + _MEAN * mean + _GRADIENT * gradient * s + _TEXTURE * np.exp(_SPREAD * texture) * waves
    image = gain * (_SURROUNDINGS + amplitude * inside * content)
    return stored(organ, image.astype(np.float32), noise, rng)


def directional_texture(
    axes: Sequence[NDArray[np.float64]],
    codes: NDArray[np.float64],
    phases: NDArray[np.float64],
    leans: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The texture f [R, A, S].

    Args:
        axes: [R], [A] and [S] positions along R, A and S from the organ's middle, in radians of a wave.
        codes: [2]; above 0 the texture runs along R rather than A, and along R + A rather than R - A.
        phases: [4, 2, 2] phase of the waves along R, A, R + A and R - A, in the lobules by the side of R and A.
        leans: [4, 2, 2] radians along S per radian in the plane.
    """
    first, second = 1.0 / (1.0 + np.exp(-_STEEPNESS * codes))
    powers = np.array([first, 1.0 - first, second, 1.0 - second])
    r, a, s = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    ways = (r, a, (r + a) / np.sqrt(2), (r - a) / np.sqrt(2))
    lobule = (r > 0).astype(int), (a > 0).astype(int)
    total = np.zeros((r.size, a.size, s.size))
    for power, way, phase, lean in zip(powers, ways, phases, leans, strict=True):
        total += np.sqrt(power) * np.cos(way + lean[lobule] * s + phase[lobule])
    return total
