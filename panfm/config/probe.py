"""`[probe]`: frozen-feature probes after training."""

from typing import Annotated

from pydantic import Field

from panfm.config.base import Uncoupled


class ProbeConfig(Uncoupled):
    """Frozen-feature probes after training."""

    bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    """Resamples of the test subjects for the interval."""
    missing_draws: Annotated[int, Field(gt=0, le=1_000)] = 3
    """Random organ subsets per number of missing organs."""
    few_labels: Annotated[tuple[Annotated[int, Field(ge=10, le=1_000_000)], ...], Field(strict=False)] = ()
    """Numbers of labelled patients on which further probes are fitted."""
    few_draws: Annotated[int, Field(gt=0, le=1_000)] = 3
    """Random draws of these patients; their AUC is averaged."""
