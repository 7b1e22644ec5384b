"""Labels of a cohort that several sites know: the tasks of the probe of a simulation that names none."""

from pathlib import Path

import numpy as np

from panfm.config import RunConfig, load_site, site_folders
from panfm.data.labels import read_labels
from panfm.evaluate.probe_labels import read_label_info
from panfm.models import describe_model
from panfm.privacy.guarantees import privacy_label

MAX_FEATURES = 512
"""Embeddings with more numbers take too long, label by label, at the end of every run."""


def with_shared_labels(run: RunConfig, cohort: Path) -> RunConfig:
    """Make a task of each yes/no label that at least two sites of a cohort know.

    A run that names tasks, makes a claim of privacy, or has large embeddings is returned as it is; so is the run of a
    cohort without held-out patients, on whom probes would be tested.
    """
    is_tested = (cohort / "holdout" / "site.toml").is_file() and (cohort / "cohort.toml").is_file()
    if run.probe.tasks or privacy_label(run) != "none" or not is_tested:
        return run
    if describe_model(run).embedding_size > MAX_FEATURES:
        return run
    yes_no = [name for name, label in read_label_info(cohort).items() if not label.is_number]
    if not yes_no:
        return run
    known = [_known_labels(folder) for folder in site_folders(cohort / "sites")]
    tasks = {name: (name,) for name in yes_no if sum(name in names for names in known) > 1}
    return run.model_copy(update={"probe": run.probe.model_copy(update={"tasks": tasks})})


def _known_labels(folder: Path) -> set[str]:
    """Labels of which a site knows some subject's."""
    site = load_site(folder)
    if site.labels is None:
        return set()
    table = read_labels(folder, site)
    return {name for name, values in zip(table.names, table.values.T, strict=True) if np.isfinite(values).any()}
