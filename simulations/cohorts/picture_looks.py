"""Pictures of a shape in ten modalities, each with its own intensities, textures, noise and colours.

Each look takes the share of every pixel that the shape covers and draws a whole picture around it. None is a model of
the physics; each has the statistics that give its modality away (speckle and attenuation, Rician noise under a bias
field, stained nuclei, layers, vessels), and a nuisance of its own: contrast, illumination, where the texture lies.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import Modality
from simulations.cohorts.picture_shapes import SIZE, Field, pixel_axes

_Y, _X = pixel_axes()
_R = np.hypot(_Y, _X)


def render(modality: Modality, mask: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One picture: uint8 [SIZE, SIZE], or [SIZE, SIZE, 3] for a modality in colour.

    Args:
        modality: whose look.
        mask: [SIZE, SIZE] in [0, 1], where the shape is.
        rng: nuisance and noise.
    """
    picture = LOOKS[modality](mask, rng)
    return np.rint(255.0 * np.clip(picture, 0.0, 1.0)).astype(np.uint8)


def blur(field: Field, sigma: float) -> Field:
    """Gaussian blur of `sigma` pixels; the picture is taken to repeat."""
    across, along = np.fft.rfftfreq(SIZE)[None, :], np.fft.fftfreq(SIZE)[:, None]
    transfer = np.exp(-2.0 * (np.pi * sigma) ** 2 * (across**2 + along**2))
    blurred: Field = np.fft.irfft2(np.fft.rfft2(field) * transfer, s=(SIZE, SIZE))
    return blurred


def _noise(rng: np.random.Generator, sd: float) -> Field:
    return sd * rng.standard_normal((SIZE, SIZE))


def _texture(rng: np.random.Generator, sigma: float) -> Field:
    """Smooth random field of mean 0 and sd 1, with spots of about `sigma` pixels."""
    field = blur(_noise(rng, 1.0), sigma)
    return (field - field.mean()) / field.std()


def _inside(radius: float, softness: float = 0.02) -> Field:
    """The disc of the field of view."""
    return 1.0 / (1.0 + np.exp((_R - radius) / softness))


def _colour(red: float, green: float, blue: float) -> Field:
    return np.array([red, green, blue])


def _mix(low: Field, high: Field, share: Field) -> Field:
    """From one colour to another, pixel by pixel: [SIZE, SIZE, 3]."""
    return low + (high - low) * share[..., None]


def _xray(mask: Field, rng: np.random.Generator) -> Field:
    """Projection: everything adds up; ribs, soft borders, little noise."""
    ribs = np.cos(2.0 * np.pi * (rng.uniform(2.0, 3.0) * (_Y + 0.4 * _X**2) + rng.uniform()))
    body = 0.30 + 0.20 * (1.0 - _X**2) + 0.04 * ribs + 0.04 * _texture(rng, 8.0)
    return body + rng.uniform(0.15, 0.30) * blur(mask, 1.0) + _noise(rng, 0.02)


def _ct(mask: Field, rng: np.random.Generator) -> Field:
    """Flat tissue in black air, a ring of bone, low contrast, white noise."""
    radius = rng.uniform(0.85, 0.95)
    tissue = 0.42 + rng.choice([-1.0, 1.0]) * rng.uniform(0.08, 0.16) * mask + _noise(rng, 0.05)
    bone = _inside(radius) - _inside(radius - 0.07)
    return tissue * _inside(radius) + 0.5 * bone


def _pet(mask: Field, rng: np.random.Generator) -> Field:
    """Counts: a hot shape on a dark background, coarse, as noisy as it is bright."""
    activity = 0.06 + 0.05 * _inside(0.9, 0.1) + rng.uniform(0.35, 0.7) * mask
    counts = rng.poisson(60.0 * blur(activity, 2.0).clip(0.0)) / 60.0
    return blur(counts, 0.8)


def _mr(mask: Field, rng: np.random.Generator) -> Field:
    """Soft tissue under a bias field, Rician noise; the shape is dark."""
    bias = np.exp(0.35 * (np.cos(rng.uniform(0, 2 * np.pi)) * _X + np.sin(rng.uniform(0, 2 * np.pi)) * _Y))
    tissue = (0.6 + 0.08 * _texture(rng, 3.0)) * (1.0 - rng.uniform(0.4, 0.7) * mask)
    signal = bias * tissue * _inside(0.97)
    return np.hypot(signal + _noise(rng, 0.04), _noise(rng, 0.04))


def _ultrasound(mask: Field, rng: np.random.Generator) -> Field:
    """Multiplicative speckle that fades with depth; the shape gives little echo."""
    speckle = np.hypot(blur(_noise(rng, 1.0), 0.9), blur(_noise(rng, 1.0), 0.9))
    depth = np.exp(-rng.uniform(0.2, 0.7) * (_Y + 1.0))
    echo = 0.5 * (1.0 + 0.2 * _texture(rng, 6.0)) * (1.0 - rng.uniform(0.6, 0.85) * mask)
    return depth * echo * speckle / speckle.mean()


def _fundus(mask: Field, rng: np.random.Generator) -> Field:
    """An orange disc on black with dark vessels; the shape is a pale patch."""
    retina = _mix(_colour(0.75, 0.35, 0.12), _colour(0.90, 0.50, 0.22), 0.5 + 0.2 * _texture(rng, 10.0))
    bend, phase = rng.uniform(0.5, 1.5), rng.uniform(0.0, 2.0 * np.pi)
    paths = [_Y - level - 0.15 * np.sin(bend * np.pi * _X + phase) for level in rng.uniform(-0.7, 0.7, size=4)]
    vessels = np.maximum.reduce([np.exp(-((path / 0.03) ** 2)) for path in paths])
    seen = _mix(retina, _colour(0.95, 0.85, 0.55), rng.uniform(0.5, 0.9) * mask)
    seen = _mix(seen, _colour(0.45, 0.10, 0.06), 0.7 * vessels)
    return (seen + _noise(rng, 0.015)[..., None]) * _inside(0.93)[..., None]


def _oct(mask: Field, rng: np.random.Generator) -> Field:
    """Wavy horizontal layers with fine speckle; the shape is a dark cyst."""
    wave = 0.12 * np.sin(np.pi * rng.uniform(0.6, 1.4) * _X + rng.uniform(0.0, 2.0 * np.pi))
    layers = 0.45 + 0.25 * np.cos(2.0 * np.pi * rng.uniform(2.2, 3.2) * (_Y - wave) + rng.uniform(0.0, 2.0 * np.pi))
    tissue = layers * np.exp(-0.3 * (_Y + 1.0)) * (1.0 - rng.uniform(0.7, 0.9) * mask)
    return tissue * rng.gamma(4.0, 0.25, size=(SIZE, SIZE)) + np.abs(_noise(rng, 0.03))


def _pathology(mask: Field, rng: np.random.Generator) -> Field:
    """Pink stain with violet nuclei, which stand closer together inside the shape."""
    stain = _mix(_colour(0.93, 0.72, 0.82), _colour(0.85, 0.55, 0.70), 0.5 + 0.25 * _texture(rng, 4.0))
    crowd = rng.uniform(0.012, 0.02) * (1.0 + rng.uniform(7.0, 11.0) * mask)
    nuclei = blur((rng.uniform(size=mask.shape) < crowd).astype(np.float64), 1.1) * 9.0
    return _mix(stain, _colour(0.36, 0.20, 0.52), np.clip(nuclei, 0.0, 1.0)) + _noise(rng, 0.02)[..., None]


def _endoscopy(mask: Field, rng: np.random.Generator) -> Field:
    """Red mucosa with folds under one lamp, dark at the rim, with glints; the shape is a paler lump."""
    folds = np.cos(2.0 * np.pi * (rng.uniform(1.2, 2.0) * _R + 0.25 * _texture(rng, 9.0)))
    mucosa = _mix(_colour(0.62, 0.22, 0.18), _colour(0.85, 0.42, 0.33), 0.5 + 0.3 * folds)
    seen = _mix(mucosa, _colour(0.95, 0.68, 0.58), rng.uniform(0.5, 0.85) * blur(mask, 1.0))
    lamp = np.exp(-rng.uniform(0.5, 1.1) * _R**2)
    glints = np.clip(blur((rng.uniform(size=mask.shape) < 0.003).astype(np.float64), 1.0) * 8.0, 0.0, 1.0)
    return _mix(seen * lamp[..., None], _colour(1.0, 1.0, 1.0), glints) + _noise(rng, 0.02)[..., None]


def _photo(mask: Field, rng: np.random.Generator) -> Field:
    """Skin of any tone in slanted light, with hairs; the shape is a brown spot."""
    tone = _colour(0.88, 0.68, 0.56) * rng.uniform(0.6, 1.05)
    light = 1.0 + 0.2 * (rng.uniform(-1.0, 1.0) * _X + rng.uniform(-1.0, 1.0) * _Y) + 0.03 * _texture(rng, 1.2)
    angle = rng.uniform(0.0, np.pi, size=6)
    paths = [np.cos(a) * _X + np.sin(a) * _Y - shift for a, shift in zip(angle, rng.uniform(-0.8, 0.8, 6), strict=True)]
    hairs = np.maximum.reduce([np.exp(-((path / 0.015) ** 2)) for path in paths])
    spot = tone * _colour(0.62, 0.50, 0.45)
    seen = _mix(tone, spot, rng.uniform(0.6, 1.0) * mask) * light[..., None]
    return _mix(seen, _colour(0.15, 0.10, 0.08), 0.6 * hairs) + _noise(rng, 0.015)[..., None]


LOOKS: dict[Modality, Callable[[Field, np.random.Generator], Field]] = {
    Modality.XRAY: _xray,
    Modality.CT: _ct,
    Modality.PET: _pet,
    Modality.MR: _mr,
    Modality.ULTRASOUND: _ultrasound,
    Modality.FUNDUS: _fundus,
    Modality.OCT: _oct,
    Modality.PATHOLOGY: _pathology,
    Modality.ENDOSCOPY: _endoscopy,
    Modality.PHOTO: _photo,
}
