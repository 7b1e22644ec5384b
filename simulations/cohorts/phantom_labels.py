"""Labels of the phantom's patients: 13 disease categories and 14 diseases.

A label is a noisy threshold of a nonlinear function of the latent factors: linear terms, products of two factors and a
burden term that grows only on the diseased side. Thresholds come from one fixed reference population, so a label means
the same in every cohort.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from panfm.seeds import numpy_generator
from simulations.cohorts.phantom_body import FACTORS, mixing

LABEL_NOISE = 0.9
"""Sd of what no image shows, against a score of unit variance."""


@dataclass(frozen=True)
class Label:
    """One yes/no label."""

    kind: Literal["category", "disease"]
    prevalence: float
    organs: tuple[str, ...]
    """Organs that show it."""
    weak: bool = False
    """Shown mainly by brain, kidney, spleen or pancreas."""
    linear: dict[str, float] = field(default_factory=dict)
    products: dict[tuple[str, str], float] = field(default_factory=dict)
    burden: dict[str, float] = field(default_factory=dict)
    """Weights of max(factor, 0)."""


LABELS = {
    "infections": Label("category", 0.20, ("spleen", "liver"), True, {"haematologic": 0.8, "hepatic": 0.3}),
    "neoplasms": Label(
        "category", 0.15, ("liver", "pancreas", "adipose"), False, {"age": 0.6, "hepatic": 0.5, "pancreatic": 0.5}
    ),
    "blood": Label("category", 0.12, ("spleen",), True, {"haematologic": 0.9}, {}, {"haematologic": 0.6}),
    "endocrine": Label(
        "category", 0.30, ("adipose", "pancreas"), False, {"metabolic": 0.7, "pancreatic": 0.4}, {}, {"adiposity": 0.5}
    ),
    "mental": Label("category", 0.25, ("brain",), True, {"cognitive": 0.9}, {("cognitive", "neuro"): 0.3}),
    "nervous": Label("category", 0.18, ("brain",), True, {"neuro": 0.7, "cognitive": 0.5}, {}, {"neuro": 0.4}),
    "eye": Label("category", 0.25, ("heart", "brain"), False, {"age": 0.7, "vascular": 0.5, "metabolic": 0.3}),
    "circulatory": Label("category", 0.35, ("heart",), False, {"vascular": 0.7, "cardiac": 0.6}),
    "respiratory": Label(
        "category", 0.25, ("heart", "adipose"), False, {"cardiac": 0.6, "adiposity": 0.5}, {("age", "adiposity"): 0.3}
    ),
    "digestive": Label(
        "category", 0.30, ("liver", "pancreas"), True, {"hepatic": 0.5, "pancreatic": 0.7}, {}, {"pancreatic": 0.3}
    ),
    "skin": Label("category", 0.15, ("adipose", "spleen"), False, {"metabolic": 0.6, "haematologic": 0.5}),
    "musculoskeletal": Label(
        "category", 0.33, ("adipose", "heart"), False, {"age": 0.6, "adiposity": 0.5, "stature": 0.4}
    ),
    "genitourinary": Label("category", 0.22, ("kidney",), True, {"renal": 0.9, "age": 0.2}),
    "type-2-diabetes": Label(
        "disease",
        0.15,
        ("pancreas", "adipose"),
        True,
        {"pancreatic": 0.7, "metabolic": 0.4},
        {("pancreatic", "metabolic"): 0.3},
    ),
    "obesity": Label("disease", 0.25, ("adipose",), False, {"adiposity": 1.0}),
    "hypertension": Label("disease", 0.35, ("heart", "kidney"), False, {"vascular": 0.9, "renal": 0.2}),
    "heart-failure": Label("disease", 0.10, ("heart",), False, {"cardiac": 0.9}, {}, {"cardiac": 0.5}),
    "atrial-fibrillation": Label(
        "disease", 0.12, ("heart",), False, {"cardiac": 0.7, "age": 0.4}, {("cardiac", "age"): 0.3}
    ),
    "stroke": Label("disease", 0.10, ("brain", "heart"), False, {"vascular": 0.6, "neuro": 0.5}),
    "dementia": Label("disease", 0.12, ("brain",), True, {"neuro": 0.5, "cognitive": 0.7}, {("neuro", "age"): 0.3}),
    "depression": Label("disease", 0.20, ("brain",), True, {"cognitive": 0.9}, {}, {"adiposity": 0.2}),
    "chronic-kidney-disease": Label(
        "disease", 0.12, ("kidney",), True, {"renal": 0.8}, {("renal", "vascular"): 0.2}, {"renal": 0.4}
    ),
    "kidney-stones": Label("disease", 0.10, ("kidney",), True, {"renal": 0.8, "metabolic": 0.3}),
    "fatty-liver": Label(
        "disease", 0.30, ("liver", "adipose"), False, {"hepatic": 0.8}, {("hepatic", "adiposity"): 0.3}
    ),
    "portal-hypertension": Label(
        "disease",
        0.10,
        ("spleen", "liver"),
        True,
        {"haematologic": 0.7, "hepatic": 0.5},
        {("haematologic", "hepatic"): 0.3},
    ),
    "pancreatitis": Label("disease", 0.10, ("pancreas",), True, {"pancreatic": 0.8}, {}, {"pancreatic": 0.5}),
    "anaemia": Label("disease", 0.15, ("spleen", "kidney"), True, {"haematologic": 0.8, "renal": 0.3}),
}


def score(label: Label, latents: NDArray[np.float64]) -> NDArray[np.float64]:
    """The label's function of the factors, before noise and threshold: [N, F] -> [N]."""
    factor = {name: latents[:, column] for column, name in enumerate(FACTORS)}
    total = np.zeros(len(latents))
    for name, weight in label.linear.items():
        total += weight * factor[name]
    for (first, second), weight in label.products.items():
        total += weight * factor[first] * factor[second]
    for name, weight in label.burden.items():
        total += weight * np.maximum(factor[name], 0.0)
    return total


def draw_labels(latents: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Noisy thresholds of the scores: [N, F] -> [N, L], columns in the order of `LABELS`."""
    noise = LABEL_NOISE * rng.standard_normal((len(latents), len(LABELS)))
    columns = []
    for column, (name, label) in enumerate(LABELS.items()):
        scale, threshold = _calibration(name)
        columns.append(score(label, latents) / scale + noise[:, column] > threshold)
    return np.stack(columns, axis=1)


@cache
def _calibration(name: str) -> tuple[float, float]:
    """Sd of a label's score and its threshold, over the reference population."""
    rng = numpy_generator(0, "phantom", "reference", name)
    latents = rng.standard_normal((20_000, len(FACTORS))) @ mixing().T
    scores = score(LABELS[name], latents)
    scale = float(scores.std())
    noisy = scores / scale + LABEL_NOISE * rng.standard_normal(len(scores))
    return scale, float(np.quantile(noisy, 1.0 - LABELS[name].prevalence))
