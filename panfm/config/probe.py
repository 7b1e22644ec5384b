"""`[probe]`: frozen-feature probes after training."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, field_validator

from panfm.config.base import Config

TaskName = Annotated[str, Field(pattern=r"^[^/]{1,128}$")]
LabelName = Annotated[str, Field(min_length=1, max_length=128)]


class ProbeConfig(Config):
    """Frozen-feature probes after training."""

    tasks: Annotated[
        dict[TaskName, Annotated[tuple[LabelName, ...], Field(strict=False, min_length=1, max_length=64)]],
        Field(max_length=256),
    ] = Field(default_factory=dict)
    """Task -> its labels, columns of the sites' label tables. After the last round the sites are asked for sums of
    features and labels, and one ridge regression of all sites is written into the model's folder; a patient knows all
    labels of a task or is left out. A simulation without tasks takes each yes/no label of its cohort as one."""

    @field_validator("tasks")
    @classmethod
    def _labels_stand_once(cls, tasks: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for task, labels in tasks.items():
            if twice := [label for label in labels if labels.count(label) > 1]:
                raise ValueError(f"{task}: label {twice[0]!r} stands twice, expected once")
            if twins := [other for other in tasks if other < task and {*tasks[other]} == {*labels}]:
                raise ValueError(f"{task}: has the labels of {twins[0]!r}, expected one task of them")
        return tasks

    lda_shrinkage: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fits a linear discriminant analysis of each yes/no label as well, from the same sums, whose scores are log-odds:
    share of the covariance within classes that the features' mean variance replaces. None is fitted when left out."""
    bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    """Resamples of the test subjects for the interval."""
    missing_draws: Annotated[int, Field(gt=0, le=1_000)] = 3
    """Random organ subsets per number of missing organs."""
    personal_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps that a copy of the final model takes on each site's own images, its experts kept, for comparison, at the
    end of a simulation; none when left out. A run with `[task]` has `task.personal-steps` instead."""
    few_labels: Annotated[tuple[Annotated[int, Field(ge=10, le=1_000_000)], ...], Field(strict=False)] = ()
    """Numbers of labelled patients on which further probes are fitted."""
    few_draws: Annotated[int, Field(gt=0, le=1_000)] = 3
    """Random draws of these patients; their AUC is averaged."""

    def couplings(self) -> Iterator[str]:
        """Yield what lets numbers of patients out of a private run without noise."""
        if self.tasks:
            yield "tasks: labels are summed over patients without noise, leave it out"
