"""Draws of a study's cohort, as files with another seed and other numbers of patients; frozen features of models."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from panfm.config import RunConfig
from panfm.data.store import Batch
from panfm.models import PanModel
from simulations.cohorts.cohort_source import CohortSource
from simulations.cohorts.opened import OpenedCohort


def resized(cohort: CohortSource, seed: int, *, subjects: int, holdout: int) -> CohortSource:
    """Another draw of a cohort of phantoms or pictures.

    Args:
        cohort: The cohort of a run.
        seed: Seed of the draw.
        subjects: Patients of each site, or, where patients have one stream, of each stream at its site.
        holdout: Held-out patients.
    """
    table = cohort.table()
    sites = {
        name: site | {"subjects": subjects * (len(site["streams"]) if "streams" in site else 1)}
        for name, site in table["sites"].items()
    }
    return type(cohort).model_validate(table | {"seed": seed, "sites": sites, "holdout-subjects": holdout})


def write_files(cohort: CohortSource, folder: Path, run: RunConfig) -> Path:
    """Write a cohort and build the caches of its images; returns its folder."""
    cohort.write(folder, run.streams)
    OpenedCohort.open(folder, run)
    return folder


@dataclass(frozen=True)
class FrozenReader:
    """An embedder that reads features off a model in a way of its own."""

    model: PanModel
    embed: Callable[[Batch], Tensor]

    def eval(self) -> object:
        """Go to inference mode."""
        return self.model.eval()
