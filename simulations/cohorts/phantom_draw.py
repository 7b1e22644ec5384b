"""Patients of a phantom cohort: their factors, their labels, and which organs were scanned.

Heart and adipose dominate a body in one of three ways. `transient`: they are drawn with far more contrast, and that is
all; a model that trains longer outgrows it. `lasting`: besides, stature and adiposity are written into every organ, so
that a hidden piece of a weak organ is cheaply guessed from heart and adipose, and heart and adipose are scanned in
nearly everyone, so that no batch forces a model to do without them.

`shortcut`: all organs have the same contrast, so that scaled inputs take no dominance away, but heart and adipose show
stature and adiposity almost purely, these are written strongly into every organ, and heart and adipose are scanned in
nearly everyone: what a weak organ has in common with them stays the cheapest guess, however long a model trains.

`textured` asks for features that have to be learned: the factors show in the direction of a texture
(`phantom_texture.py`), to which mean, spread and percentiles are blind; the traits show little of them. Weak organs are
scanned in fewer patients, so that few patients are complete.

Shape legend: N patients, F factors, L labels, O organs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import Modality, parse_stream
from panfm.config import StreamConfig
from panfm.errors import DataError
from panfm.seeds import numpy_generator
from simulations.cohorts.phantom_body import FACTORS, ORGANS, TRAITS, loadings, mixing
from simulations.cohorts.phantom_image import affine, render
from simulations.cohorts.phantom_labels import draw_labels
from simulations.cohorts.phantom_texture import code_loadings, render_texture

_SEVERITY = 0.7
_AGE = 0.3
_SITE_POLICY = 0.3
"""Log-odds of a scan per sd of the organ's severity, per sd of age, and sd between the habits of sites."""


@dataclass(frozen=True)
class Preset:
    """Dominance of each organ, and share of scans that are missing."""

    amplitude: dict[str, float]
    """Organ -> contrast against its surroundings, as a share of the scanner's range: the dominance knob."""
    nuisance: dict[str, float]
    """Organ -> sd of what its traits show of nothing else, against a signal of unit variance."""
    redundancy: float
    """Sd of stature and adiposity in every trait of every organ, against a signal of unit variance."""
    noise: float
    """Sd of the voxel noise, as a share of the scanner's range."""
    scan_odds: dict[str, float]
    """Organ -> log-odds that it is scanned in an average patient of a site that has the scanner."""
    signal: float = 1.0
    """Sd of what traits show of the factors."""
    code_nuisance: float | None = None
    """Sd of what the codes of the texture show of nothing else, against a signal of unit variance; None for a texture
    that has no direction."""


_NUISANCE = dict.fromkeys(ORGANS, 0.9) | {"heart": 1.3, "adipose": 1.5}

PRESETS = {
    "transient": Preset(
        amplitude=dict.fromkeys(ORGANS, 0.075) | {"heart": 0.27, "adipose": 0.3, "liver": 0.1, "pancreas": 0.09},
        nuisance=_NUISANCE,
        redundancy=0.0,
        noise=0.025,
        scan_odds=dict.fromkeys(ORGANS, 0.9) | {"heart": 2.5, "adipose": 2.5},
    ),
    "lasting": Preset(
        amplitude=dict.fromkeys(ORGANS, 0.035) | {"heart": 0.3, "adipose": 0.33, "liver": 0.045, "pancreas": 0.04},
        nuisance=_NUISANCE,
        redundancy=1.0,
        noise=0.025,
        scan_odds=dict.fromkeys(ORGANS, 0.8) | {"heart": 5.0, "adipose": 5.0},
    ),
    "shortcut": Preset(
        amplitude=dict.fromkeys(ORGANS, 0.15),
        nuisance=_NUISANCE | {"heart": 0.3, "adipose": 0.3},
        redundancy=2.0,
        noise=0.025,
        scan_odds=dict.fromkeys(ORGANS, 0.8) | {"heart": 5.0, "adipose": 5.0},
    ),
    "textured": Preset(
        amplitude=dict.fromkeys(ORGANS, 0.15) | {"heart": 0.22, "adipose": 0.24},
        nuisance=dict.fromkeys(ORGANS, 1.0),
        redundancy=0.0,
        noise=0.02,
        scan_odds=dict.fromkeys(ORGANS, 0.9) | {"heart": 1.5, "adipose": 1.5},
        signal=0.4,
        code_nuisance=0.35,
    ),
}


@dataclass(frozen=True)
class Subjects:
    """Patients of one place."""

    names: tuple[str, ...]
    latents: NDArray[np.float64]
    """[N, F] in the order of `FACTORS`."""
    labels: NDArray[np.bool_]
    """[N, L] in the order of `LABELS`."""
    organs: tuple[str, ...]
    """Organs the place scans."""
    scanned: NDArray[np.bool_]
    """[N, O] in the order of `organs`; every patient has at least one."""


class Phantom:
    """A population of whole bodies.

    Guarantees:
        deterministic: a patient and every image of it depend on (preset, seed, place, number, organ) alone.
    """

    def __init__(self, preset: str, seed: int) -> None:
        if preset not in PRESETS:
            raise DataError(f"phantom preset {preset!r}: expected one of {', '.join(PRESETS)}")
        self.preset = PRESETS[preset]
        self.seed = seed

    def draw(
        self, place: str, number: int, organs: Sequence[str], *, age_shift: float = 0.0, complete: bool = False
    ) -> Subjects:
        """Draw the patients of one place.

        Args:
            place: name of the site; part of the seed and of the patients' names.
            number: patients.
            organs: what the place scans.
            age_shift: mean age of its patients, in standard deviations of the population.
            complete: every organ of every patient is scanned, as in the held-out test set.

        Raises:
            DataError: an organ that the phantom does not have.
        """
        unknown = [organ for organ in organs if organ not in ORGANS]
        if unknown:
            raise DataError(f"phantom organ {unknown[0]!r}: expected one of {', '.join(ORGANS)}")
        rng = numpy_generator(self.seed, "phantom", "subjects", place)
        independent = rng.standard_normal((number, len(FACTORS)))
        independent[:, FACTORS.index("age")] += age_shift
        latents = independent @ mixing().T
        labels = draw_labels(latents, rng)
        scanned = self._scan(latents, organs, rng)
        names = tuple(f"{place}-{index:05d}" for index in range(number))
        return Subjects(names, latents, labels, tuple(organs), np.ones_like(scanned) if complete else scanned)

    def render(self, subjects: Subjects, index: int, organ: str) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
        """One organ of one patient as the scanner stores it: int16 voxels and the 4 x 4 affine to RAS millimetres."""
        rng = numpy_generator(self.seed, "phantom", "image", subjects.names[index], organ)
        traits = self._traits(subjects.latents[index], organ, rng)
        amplitude, noise = self.preset.amplitude[organ], self.preset.noise
        if self.preset.code_nuisance is None:
            voxels = render(ORGANS[organ], traits, amplitude, noise, rng)
        else:
            codes = self._codes(subjects.latents[index], organ, self.preset.code_nuisance, rng)
            voxels = render_texture(ORGANS[organ], traits, codes, amplitude, noise, rng)
        return voxels, affine(ORGANS[organ])

    def _traits(self, latents: NDArray[np.float64], organ: str, rng: np.random.Generator) -> NDArray[np.float64]:
        """Signal, shared build and private nuisance of an organ, [T] of unit variance."""
        build = (latents[FACTORS.index("stature")] + latents[FACTORS.index("adiposity")]) / np.sqrt(2.0)
        nuisance, redundancy = self.preset.nuisance[organ], self.preset.redundancy
        signal = self.preset.signal
        raw = signal * (latents @ _LOADINGS[organ]) + redundancy * build + nuisance * rng.standard_normal(len(TRAITS))
        scaled: NDArray[np.float64] = raw / np.sqrt(signal**2 + redundancy**2 + nuisance**2)
        return scaled

    def _codes(
        self, latents: NDArray[np.float64], organ: str, nuisance: float, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Codes of an organ's texture, [2] of unit variance."""
        raw = latents @ _CODE_LOADINGS[organ] + nuisance * rng.standard_normal(2)
        scaled: NDArray[np.float64] = raw / np.sqrt(1.0 + nuisance**2)
        return scaled

    def _scan(self, latents: NDArray[np.float64], organs: Sequence[str], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Missing not at random: the sicker and older are scanned more, and every site has its habits."""
        severity = latents[:, [FACTORS.index(ORGANS[organ].severity) for organ in organs]]
        base = np.array([self.preset.scan_odds[organ] for organ in organs])
        habit = _SITE_POLICY * rng.standard_normal(len(organs))
        odds = base + habit + _SEVERITY * severity + _AGE * latents[:, [FACTORS.index("age")]]
        margin = odds - np.log(1.0 / rng.uniform(size=odds.shape) - 1.0)
        scanned: NDArray[np.bool_] = (margin > 0.0) | (margin == margin.max(axis=1, keepdims=True))
        return scanned


_LOADINGS = {organ: loadings(organ) for organ in ORGANS}
_CODE_LOADINGS = {organ: code_loadings(organ) for organ in ORGANS}


def organs_of(streams: Mapping[str, StreamConfig]) -> dict[str, str]:
    """Stream -> its organ. Raises DataError for what the phantom cannot draw."""
    organs = {}
    for stream, config in streams.items():
        organ, modality = parse_stream(stream)
        if modality is not Modality.MR or not config.is_volume:
            raise DataError(f"stream {stream}: the phantom has MR volumes only, expected <organ>-mr with three axes")
        organs[stream] = organ
    return organs
