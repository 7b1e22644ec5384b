"""A linear probe of frozen features, and the probes of all sites in the folder of a model (`probe.safetensors`).

    <task>/centre, scale [D], weights [D, L], bias [L]     float64
    <task>/lda-weights [D, L], lda-bias [L]                float64, in a run with `probe.lda-shrinkage`
    metadata: pooling, and for each task its labels, patients, sites, penalty and leave-one-out R2

Shape legend: N subjects, D features, L labels.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from panfm.errors import DataError
from panfm.files import write_atomic

Floats = NDArray[np.float64]
FILE = "probe.safetensors"
_PARTS = ("centre", "scale", "weights", "bias")
_OF_LDA = ("weights", "bias")


@dataclass(frozen=True)
class LinearProbe:
    """One linear score per label; NaN for labels that could not be fitted."""

    centre: Floats
    """[D]"""
    scale: Floats
    """[D]"""
    weights: Floats
    """[D, L]"""
    bias: Floats
    """[L]"""
    notes: tuple[str, ...] = ()
    """Labels that could not be fitted, one line each."""
    reach: float = np.inf
    """Deviations from the centre, in units of the scale, beyond which a feature counts as no further."""

    def score(self, features: NDArray[np.floating]) -> Floats:
        """Scores [N, L] of features [N, D]: log-odds of a yes, or the number itself."""
        standard = (np.asarray(features, dtype=np.float64) - self.centre) / self.scale
        standard = np.clip(standard, -self.reach, self.reach)
        scores: Floats = standard @ self.weights + self.bias
        return scores


@dataclass(frozen=True)
class SharedProbe:
    """The probe of a task of labels that was fitted on the patients of several sites, and how."""

    labels: tuple[str, ...]
    patients: int
    sites: tuple[str, ...]
    penalty: float
    r2: tuple[float, ...]
    """Of each label: 1 minus the leave-one-out error over the variance; NaN without variance."""
    probe: LinearProbe
    """A ridge regression."""
    lda: LinearProbe | None = None
    """A linear discriminant analysis of the same sums, in a run with `probe.lda-shrinkage`."""

    def summary(self) -> dict[str, Any]:
        """All but the probe's numbers, for JSON."""
        return {
            "labels": list(self.labels),
            "patients": self.patients,
            "sites": list(self.sites),
            "penalty": self.penalty,
            "r2": [value if np.isfinite(value) else None for value in self.r2],
        }


def save_probes(folder: Path, probes: Mapping[str, SharedProbe], pooling: str) -> None:
    """Write the probes of all tasks into a model's folder.

    Args:
        pooling: Of the features that they were fitted on, as `--pooling` says it; they were not whitened.
    """
    tensors = {
        f"{task}/{name}": np.ascontiguousarray(getattr(shared.probe, name))
        for task, shared in probes.items()
        for name in _PARTS
    }
    tensors |= {
        f"{task}/lda-{name}": np.ascontiguousarray(getattr(shared.lda, name))
        for task, shared in probes.items()
        if shared.lda is not None
        for name in _OF_LDA
    }
    told = {task: shared.summary() for task, shared in probes.items()}
    # One entry, as safetensors writes several entries in an order that varies between processes.
    metadata = {"probes": json.dumps({"pooling": pooling, "tasks": told}, sort_keys=True)}
    write_atomic(folder / FILE, safetensors.numpy.save(tensors, metadata))


def read_probes(folder: Path) -> dict[str, SharedProbe]:
    """Task -> its probe, from the folder of a model; empty without a file. Raises DataError if it does not hold."""
    path = folder / FILE
    try:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        tasks = json.loads(header["__metadata__"]["probes"])["tasks"]
        tensors = safetensors.numpy.load(content)
        return {
            task: SharedProbe(
                tuple(told["labels"]),
                told["patients"],
                tuple(told["sites"]),
                told["penalty"],
                tuple(float("nan") if value is None else value for value in told["r2"]),
                _probe(tensors, task),
                _lda(tensors, task),
            )
            for task, told in tasks.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(f"{path}: not the probes of a run ({type(error).__name__})") from error


def _probe(tensors: Mapping[str, Floats], task: str) -> LinearProbe:
    centre, scale, weights, bias = (tensors[f"{task}/{name}"] for name in _PARTS)
    return LinearProbe(centre, scale, weights, bias)


def _lda(tensors: Mapping[str, Floats], task: str) -> LinearProbe | None:
    if f"{task}/lda-bias" not in tensors:
        return None
    centre, scale = (tensors[f"{task}/{name}"] for name in ("centre", "scale"))
    weights, bias = (tensors[f"{task}/lda-{name}"] for name in _OF_LDA)
    return LinearProbe(centre, scale, weights, bias)
