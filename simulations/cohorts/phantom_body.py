"""The body behind the phantom: latent factors of a patient, and what each organ shows of them.

Every patient has twelve correlated factors with unit variance. An organ is an ellipsoid whose six traits (size,
elongation, mean, texture, frequency, gradient) each read one or two factors. Heart and adipose show the cardiac,
vascular and metabolic side of a patient; what brain, kidney, spleen and pancreas show is written nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PARENTS: dict[str, dict[str, float]] = {
    "age": {},
    "stature": {},
    "adiposity": {"age": 0.2},
    "metabolic": {"adiposity": 0.5, "age": 0.15},
    "vascular": {"age": 0.4, "adiposity": 0.2, "metabolic": 0.15},
    "cardiac": {"vascular": 0.45, "age": 0.2},
    "renal": {"vascular": 0.25, "metabolic": 0.15, "age": 0.15},
    "hepatic": {"adiposity": 0.3, "metabolic": 0.2},
    "pancreatic": {"metabolic": 0.25, "hepatic": 0.1},
    "haematologic": {"hepatic": 0.15, "age": 0.1},
    "neuro": {"age": 0.35, "vascular": 0.1},
    "cognitive": {"neuro": 0.3},
}
"""Factor -> the factors it depends on, with weights; what is left of its unit variance is its own."""

FACTORS = tuple(PARENTS)
TRAITS = ("size", "elongation", "mean", "texture", "frequency", "gradient")


@dataclass(frozen=True, eq=False)
class Organ:
    """Look of one organ, and of its scans."""

    radius: float
    """Mean radius of the ellipsoid, in half views."""
    cycles: float
    """Texture waves across half the view."""
    severity: str
    """The factor that sends a patient to this scan."""
    traits: dict[str, dict[str, float]]
    """Trait -> factors it shows, with weights."""
    view_mm: float
    """Edge of the cube around the organ that a model should see."""
    size: tuple[int, int, int]
    """Voxels along R, A and S."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along R, A and S."""
    axcodes: str
    """Orientation in which the scanner stores the voxels."""


ORGANS = {
    "brain": Organ(
        radius=0.70,
        cycles=2.0,
        severity="neuro",
        traits={
            "size": {"neuro": -0.8, "age": -0.3},
            "elongation": {"cognitive": 0.9},
            "mean": {"cognitive": 0.6, "neuro": 0.5},
            "texture": {"neuro": 0.8, "vascular": 0.3},
            "frequency": {"cognitive": 0.7},
            "gradient": {"neuro": 0.5, "cognitive": -0.7},
        },
        view_mm=160.0,
        size=(20, 20, 16),
        spacing_mm=(8.0, 8.0, 10.0),
        axcodes="LAS",
    ),
    "heart": Organ(
        radius=0.65,
        cycles=1.5,
        severity="cardiac",
        traits={
            "size": {"cardiac": 0.7, "stature": 0.5},
            "elongation": {"cardiac": -0.8},
            "mean": {"vascular": 0.8, "age": 0.3},
            "texture": {"vascular": 0.7, "adiposity": 0.4},
            "frequency": {"age": 0.7},
            "gradient": {"cardiac": 0.6, "metabolic": 0.4},
        },
        view_mm=128.0,
        size=(16, 16, 16),
        spacing_mm=(8.0, 8.0, 8.0),
        axcodes="RAS",
    ),
    "adipose": Organ(
        radius=0.80,
        cycles=1.0,
        severity="adiposity",
        traits={
            "size": {"adiposity": 0.8, "stature": 0.4},
            "elongation": {"stature": 0.9},
            "mean": {"metabolic": 0.8},
            "texture": {"metabolic": 0.5, "age": 0.5},
            "frequency": {"stature": -0.6, "age": 0.4},
            "gradient": {"adiposity": 0.6, "metabolic": 0.5},
        },
        view_mm=384.0,
        size=(16, 16, 16),
        spacing_mm=(24.0, 24.0, 24.0),
        axcodes="LPS",
    ),
    "liver": Organ(
        radius=0.70,
        cycles=2.0,
        severity="hepatic",
        traits={
            "size": {"hepatic": 0.7, "stature": 0.4},
            "elongation": {"stature": -0.6, "hepatic": 0.5},
            "mean": {"hepatic": 0.8},
            "texture": {"hepatic": 0.7, "metabolic": 0.3},
            "frequency": {"age": 0.6},
            "gradient": {"metabolic": 0.6, "hepatic": -0.5},
        },
        view_mm=240.0,
        size=(16, 16, 20),
        spacing_mm=(15.0, 15.0, 12.0),
        axcodes="LPS",
    ),
    "kidney": Organ(
        radius=0.60,
        cycles=2.5,
        severity="renal",
        traits={
            "size": {"renal": -0.8, "stature": 0.3},
            "elongation": {"renal": 0.7},
            "mean": {"renal": 0.8, "vascular": 0.3},
            "texture": {"renal": 0.7},
            "frequency": {"vascular": 0.6},
            "gradient": {"renal": -0.8},
        },
        view_mm=128.0,
        size=(16, 16, 16),
        spacing_mm=(8.0, 8.0, 8.0),
        axcodes="ASR",
    ),
    "spleen": Organ(
        radius=0.60,
        cycles=2.0,
        severity="haematologic",
        traits={
            "size": {"haematologic": 0.8, "hepatic": 0.4},
            "elongation": {"haematologic": -0.7},
            "mean": {"haematologic": 0.9},
            "texture": {"haematologic": 0.6, "hepatic": 0.5},
            "frequency": {"hepatic": 0.6},
            "gradient": {"haematologic": 0.8},
        },
        view_mm=128.0,
        size=(18, 18, 16),
        spacing_mm=(8.0, 8.0, 8.0),
        axcodes="RAS",
    ),
    "pancreas": Organ(
        radius=0.55,
        cycles=2.5,
        severity="pancreatic",
        traits={
            "size": {"pancreatic": -0.8, "age": -0.3},
            "elongation": {"pancreatic": 0.8},
            "mean": {"pancreatic": 0.7, "metabolic": 0.4},
            "texture": {"pancreatic": 0.8},
            "frequency": {"pancreatic": 0.6},
            "gradient": {"pancreatic": -0.8, "hepatic": 0.3},
        },
        view_mm=128.0,
        size=(16, 16, 14),
        spacing_mm=(8.0, 8.0, 8.0),
        axcodes="LPI",
    ),
}


def mixing() -> NDArray[np.float64]:
    """Lower-triangular [F, F]: independent normals -> the factors of `FACTORS`, each of unit variance."""
    matrix = np.zeros((len(FACTORS), len(FACTORS)))
    for row, parents in enumerate(PARENTS.values()):
        matrix[row] = sum((weight * matrix[FACTORS.index(name)] for name, weight in parents.items()), matrix[row])
        matrix[row, row] = np.sqrt(1.0 - matrix[row] @ matrix[row])
    return matrix


def loadings(organ: str) -> NDArray[np.float64]:
    """[F, T]: how much each trait of an organ shows of each factor; every trait has unit variance over patients."""
    return unit_loadings([ORGANS[organ].traits[trait] for trait in TRAITS])


def unit_loadings(shown: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """[F, K]: weights of the factors in K sums of factors, scaled so that every sum has unit variance over patients."""
    matrix = np.zeros((len(FACTORS), len(shown)))
    for column, factors in enumerate(shown):
        for factor, weight in factors.items():
            matrix[FACTORS.index(factor), column] = weight
    return matrix / np.linalg.norm(mixing().T @ matrix, axis=0)
