"""Patients of a phantom cohort: their factors, their labels, and which organs were scanned.

Shape legend: N patients, F factors, L labels, O organs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panfm.data.phantom.body import FACTORS, ORGANS, TRAITS, loadings, mixing
from panfm.data.phantom.labels import draw_labels
from panfm.data.phantom.presets import PRESETS
from panfm.data.phantom.render import affine, render
from panfm.errors import DataError
from panfm.seeds import numpy_generator

_SEVERITY = 0.7
_AGE = 0.3
_SITE_POLICY = 0.3
"""Log-odds of a scan per sd of the organ's severity, per sd of age, and sd between the habits of sites."""


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
        voxels = render(ORGANS[organ], traits, self.preset.amplitude[organ], self.preset.noise, rng)
        return voxels, affine(ORGANS[organ])

    def _traits(self, latents: NDArray[np.float64], organ: str, rng: np.random.Generator) -> NDArray[np.float64]:
        """Signal, shared build and private nuisance of an organ, [T] of unit variance."""
        build = (latents[FACTORS.index("stature")] + latents[FACTORS.index("adiposity")]) / np.sqrt(2.0)
        nuisance, redundancy = self.preset.nuisance[organ], self.preset.redundancy
        raw = latents @ _LOADINGS[organ] + redundancy * build + nuisance * rng.standard_normal(len(TRAITS))
        scaled: NDArray[np.float64] = raw / np.sqrt(1.0 + redundancy**2 + nuisance**2)
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
